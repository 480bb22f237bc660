"""A shop in four services: orders (with the saga), payments, warehouse, insights; they talk over topics alone."""
