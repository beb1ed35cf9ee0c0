"""The HTTPS link: what carries assignments and updates between this server and real devices."""
