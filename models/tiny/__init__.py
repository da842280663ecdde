"""The built-in pair: the weights, and the word problems that it solves."""
