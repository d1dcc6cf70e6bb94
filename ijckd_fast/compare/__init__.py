"""Methods side by side: runs in regimes and seeds, intervals, the demo."""
