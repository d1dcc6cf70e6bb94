"""Theory beside the trainer: the bound on a student's error, and studies of small solvable cases."""
