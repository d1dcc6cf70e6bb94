"""What a student learns: objectives, connectors, and the distiller that ties student and teacher."""
