"""Graph in, graph out: the operators, the matcher and the rewrites, in pure torch."""
