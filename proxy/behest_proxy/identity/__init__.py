"""Who is calling: tokens verified and minted, API keys proved, sessions bound. No route, no database."""
