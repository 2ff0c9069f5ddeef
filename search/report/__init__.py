"""Output for people: lines, tables, pictures, pages."""
