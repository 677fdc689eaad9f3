"""Where behaviours, task rows and safety rows come from: files, or a plug-in's world."""
