"""The built-in pair: a draft and a target trained on generated word problems, and their recipe."""
