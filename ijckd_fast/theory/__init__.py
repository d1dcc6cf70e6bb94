"""Theory of distillation that can be computed: closed forms, and studies that measure them. numpy only."""
