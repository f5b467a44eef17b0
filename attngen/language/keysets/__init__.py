"""Key sets as declarations: `base` reads them, the other files register one family each."""
