"""The schema of the Supabase store, and what applies it to a project (`apply`).

`schema/` holds numbered steps, each applied once; `code/` the functions, policies and grants, which
are replaced as a whole each time.
"""
