"""Serve the page of a tiny run: chat_program.py RUN [unguarded]; the first line of stdout says where.

A process of its own, as gradio leaves event loops behind. Unguarded, gradio itself has to refuse paths.
"""

import json
import sys
import threading
from pathlib import Path

from support.talking import speaker_of
from unitoken.train.chat import server
from unitoken.train.chat.talk import PageAbout

if __name__ == "__main__":
    if sys.argv[2:] == ["unguarded"]:
        server.OnlyThisPage._refusal_of_message = lambda *_: None  # type: ignore[method-assign]
    speaker = speaker_of(Path(sys.argv[1]))
    with server.gradio_folder() as folder:
        app = server.build_app(speaker, PageAbout("<b>runs</b>/tiny", [(16, 32)], 1.0, False, 200), folder)
        listener = server.listen(0)
        with server.running(app, listener):
            print(json.dumps({"port": listener.getsockname()[1], "folder": str(folder)}), flush=True)
            threading.Event().wait()
