"""The studio's web server: what stands between a stranger's request and the pages."""
