"""How does one command answer the question? Presets, the stages of a run, its folder and its report.

Whatever a run shows is made from the files of its folder.
"""
