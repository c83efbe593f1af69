"""How well a protected model resists personalization, what else it lost, and how sure that is."""
