"""Methods side by side on the same subjects: how visible each is, and what it leaves of attacks."""
