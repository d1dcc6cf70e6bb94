"""Makes a teacher cache, and checks it against the teacher."""
