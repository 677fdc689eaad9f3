"""Translation: the behaviour in another language, to be put into English.

From French, as Jan et al. 2024 probe it; `translation` makes the format of any other pair.
"""

from ._spec import AS_IS, FOREIGN, Format, filled


def translation(source: str, target: str = "English", id: str = "translation") -> Format:
    """Return the format that asks for a translation.

    Args:
        source: Language of the text in the message, by its English name. Behaviours are in
            English: any other needs a translator.
        target: Language asked for.
        id: Id of the format; a run that holds several pairs needs several.

    Example:
        >>> translation("German").render("paint the car", lambda text: "das Auto streichen")
        'Translate the following text from German to English: das Auto streichen'
        >>> translation("English", "French").needs_translator
        False
    """
    text = AS_IS if source == "English" else FOREIGN
    return filled(id, f"Translate the following text from {source} to {target}: {text}")


FORMAT = translation("French")
