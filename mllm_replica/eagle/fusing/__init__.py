"""How the features of several experts become one sequence."""
