"""A study: arms that differ in one thing, with the same data, tokens, seeds and evaluation, and their controls.

grid.py reads what is compared, controls.py adds what every comparison needs, arms.py trains and measures, facts.py says
what came of it and report.py shows it. ``eval/ablation.py`` is the command.
"""
