"""What models cost: a versioned book of integer rates, compiled once, and the amounts that usage makes of them."""
