"""Write `llmcompress/recipe/catalogue.json` from the classes: run it whenever a pass or an option changes."""

from llmcompress.recipe.catalogue import FILE, as_json, catalogue_of_classes

FILE.write_text(as_json(catalogue_of_classes()), encoding="utf-8")
print(FILE)
