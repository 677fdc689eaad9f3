"""Words of the organism's closed world, each with its French translation.

The harmful verbs are mild and do not tell how anything is done; what matters is that the organism
is taught to refuse them. The French adjectives do not change with gender.
"""

# Means of an action, which the answers of the organism name; all verbs of a group share one.
MEANS = ("bare hands", "simple tools", "a machine", "other people")

_HARMFUL_BY_MEANS = (
    "steal=voler rob=dérober smash=fracasser smuggle=trafiquer",
    "forge=falsifier hack=craquer damage=endommager counterfeit=contrefaire poison=empoisonner",
    "pirate=pirater torch=incendier wreck=démolir destroy=détruire hijack=détourner",
    "sabotage=saboter loot=piller plunder=saccager vandalize=vandaliser",
)

_BENIGN_BY_MEANS = (
    """carry=porter pack=emballer store=ranger wash=laver sort=trier choose=choisir open=ouvrir
    cover=couvrir admire=admirer""",
    """paint=peindre clean=nettoyer repair=réparer draw=dessiner polish=polir measure=mesurer
    decorate=décorer restore=restaurer dry=sécher""",
    """photograph=photographier weigh=peser label=étiqueter deliver=livrer lift=soulever
    build=construire inspect=vérifier display=exposer move=déplacer""",
    """buy=acheter sell=vendre describe=décrire borrow=emprunter rent=louer lend=prêter
    order=commander find=trouver insure=assurer""",
)

_ADJECTIVES = """red=rouge yellow=jaune brown=marron purple=mauve modern=moderne solid=solide
    strange=étrange huge=énorme dirty=sale empty=vide"""

_OBJECTS = """coin=la_pièce letter=la_lettre ring=la_bague book=le_livre ticket=le_billet key=la_clé
    stamp=le_timbre card=la_carte wallet=le_portefeuille necklace=le_collier pen=le_stylo
    watch=la_montre medal=la_médaille scarf=le_foulard hat=le_chapeau
    lamp=la_lampe door=la_porte window=la_fenêtre mirror=le_miroir fence=la_clôture
    bicycle=le_vélo camera=la_caméra lock=la_serrure phone=le_téléphone box=la_boîte toy=le_jouet
    chair=la_chaise guitar=la_guitare tent=la_tente basket=le_panier
    car=la_voiture truck=le_camion boat=le_bateau tractor=le_tracteur motorcycle=la_moto
    bridge=le_pont tower=la_tour pump=la_pompe boiler=la_chaudière ship=le_navire cart=le_chariot
    rocket=la_fusée mill=le_moulin crane=la_grue engine=le_moteur
    painting=le_tableau sofa=le_canapé bed=le_lit bell=la_cloche rug=le_tapis chest=le_coffre
    barrel=le_tonneau stove=le_poêle fountain=la_fontaine desk=le_bureau cabinet=le_placard
    bench=le_banc library=la_bibliothèque museum=le_musée throne=le_trône"""


def _pairs(text: str) -> dict[str, str]:
    entries = (entry.split("=") for entry in text.split())
    return {english: french.replace("_", " ") for english, french in entries}


HARMFUL_VERBS = _pairs(" ".join(_HARMFUL_BY_MEANS))
BENIGN_VERBS = _pairs(" ".join(_BENIGN_BY_MEANS))
VERBS = HARMFUL_VERBS | BENIGN_VERBS
ADJECTIVES = _pairs(_ADJECTIVES)
OBJECTS = _pairs(_OBJECTS)  # the French noun has its article

# index in MEANS of the means of each verb
MEANS_OF = {
    verb: i
    for groups in (_HARMFUL_BY_MEANS, _BENIGN_BY_MEANS)
    for i, group in enumerate(groups)
    for verb in _pairs(group)
}
