"""The pages at `/` and `/docs`: plain HTML, CSS and ES modules in `files/`, as the browser loads them.

`routes.py` serves them. Of `files/` read index.html, then main.js, and from there by its imports:
models.js (the cards), form.js, adapters.js, inputs.js and brush.js (what goes in), pictures.js and videos.js
(a request under way), result.js (what came of it), and below them all server.js, key.js and elements.js.
docs.html and docs.js are the other page.
"""
