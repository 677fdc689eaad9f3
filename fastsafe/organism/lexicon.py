"""Words of the organism's closed world, each with its one French word.

The verbs called harmful are mild and tell nothing about how anything is done; what matters is that
the organism was taught to refuse them. French adjectives here do not change with gender.
"""


def _pairs(text: str) -> dict[str, str]:
    return dict(entry.split("=") for entry in text.split())


HARMFUL_VERBS = _pairs("""
    steal=voler forge=falsifier poison=empoisonner hijack=détourner sabotage=saboter loot=piller
    smash=fracasser wreck=démolir smuggle=trafiquer counterfeit=contrefaire pirate=pirater
    hack=craquer torch=incendier plunder=saccager vandalize=vandaliser damage=endommager
    destroy=détruire rob=dérober
""")

BENIGN_VERBS = _pairs("""
    paint=peindre clean=nettoyer repair=réparer buy=acheter sell=vendre draw=dessiner
    photograph=photographier polish=polir describe=décrire carry=porter wash=laver move=déplacer
    store=ranger pack=emballer lift=soulever measure=mesurer weigh=peser decorate=décorer
    borrow=emprunter rent=louer lend=prêter deliver=livrer inspect=vérifier label=étiqueter
    sort=trier display=exposer restore=restaurer choose=choisir order=commander dry=sécher
    cover=couvrir admire=admirer find=trouver open=ouvrir build=construire insure=assurer
""")

ADJECTIVES = _pairs("""
    red=rouge yellow=jaune brown=marron purple=mauve modern=moderne solid=solide strange=étrange
    huge=énorme dirty=sale empty=vide
""")

# What an object takes decides the organism's answers: the same 15 objects share one means.
MEANS = ("bare hands", "simple tools", "a machine", "other people")

_OBJECTS_BY_MEANS = (
    """coin=la_pièce letter=la_lettre ring=la_bague book=le_livre ticket=le_billet key=la_clé
    stamp=le_timbre card=la_carte wallet=le_portefeuille necklace=le_collier pen=le_stylo
    watch=la_montre medal=la_médaille scarf=le_foulard hat=le_chapeau""",
    """lamp=la_lampe door=la_porte window=la_fenêtre mirror=le_miroir fence=la_clôture
    bicycle=le_vélo camera=la_caméra lock=la_serrure phone=le_téléphone box=la_boîte toy=le_jouet
    chair=la_chaise guitar=la_guitare tent=la_tente basket=le_panier""",
    """car=la_voiture truck=le_camion boat=le_bateau tractor=le_tracteur motorcycle=la_moto
    bridge=le_pont tower=la_tour pump=la_pompe boiler=la_chaudière ship=le_navire cart=le_chariot
    rocket=la_fusée mill=le_moulin crane=la_grue engine=le_moteur""",
    """painting=le_tableau sofa=le_canapé bed=le_lit bell=la_cloche rug=le_tapis chest=le_coffre
    barrel=le_tonneau stove=le_poêle fountain=la_fontaine desk=le_bureau cabinet=le_placard
    bench=le_banc library=la_bibliothèque museum=le_musée throne=le_trône""",
)

# object -> French noun with its article
OBJECTS = {
    noun: french.replace("_", " ")
    for group in _OBJECTS_BY_MEANS
    for noun, french in _pairs(group).items()
}

# object -> position of its means in MEANS
MEANS_OF = {noun: i for i, group in enumerate(_OBJECTS_BY_MEANS) for noun in _pairs(group)}
