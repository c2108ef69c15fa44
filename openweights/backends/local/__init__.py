"""The store on this machine: SQLite and a folder."""
