"""What people see: lines, tables, pictures, pages."""
