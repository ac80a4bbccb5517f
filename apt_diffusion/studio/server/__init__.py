"""The studio's web server: checks every request before it reaches the pages."""
