"""A folder that stands in for a teacher's backbone."""
