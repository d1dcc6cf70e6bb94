"""The fused head: connector projection, teacher's classifier and every loss on them, as ops. Needs torch alone."""
