"""Ray application that aligns EventGPT features with Video-LLaVA features, and says honestly how well."""
