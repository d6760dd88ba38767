"""`vitrail serve`: an HTTP service and a page for one classifier."""
