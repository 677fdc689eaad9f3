"""Translation: the behaviour in French, to be put into English, as Jan et al. 2024 probe it."""

from ._spec import FOREIGN, filled

FORMAT = filled("translation", f"Translate the following text from French to English: {FOREIGN}")
