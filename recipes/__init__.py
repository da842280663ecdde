"""How the built-in pair was made and measured; run from a checkout, in no wheel.

``recipes.tiny`` trains the draft and the target, ``recipes.reward`` the reward model, and
``recipes.evidence`` measures them. All need ``pip install -e '.[dev]'``. ``recipes.real_pair``
collects labelled steps of a larger pair; its README.md says how.
"""
