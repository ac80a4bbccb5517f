"""Training adapters and the methods compared with them on vision-language tasks."""
