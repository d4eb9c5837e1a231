"""The page, in gradio: the conversation, the next question, and the settings at the side.

Texts are shown as they are: a reply is not to be trusted, and Markdown could fetch pictures from elsewhere.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import gradio

from unitoken.train.chat.sessions import MOST_SESSIONS, Sessions, Shown
from unitoken.train.chat.talk import ChatSettings, PageAbout

KINDS = [("text and pictures", "free"), ("one picture", "picture"), ("text only", "text")]
AS_IN_THE_DATA = "as in the data"
STYLE = """
.gradio-container { max-width: 1280px !important; margin: 0 auto; }
#head { align-items: center; }
#title h1 { font-size: 1.15rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
#title p { margin: 0; opacity: .7; font-size: .85rem; }
#anew { flex-grow: 0; }
#chat .md { white-space: pre-wrap; overflow-wrap: anywhere; }
#chat .image-frame img { object-fit: contain; min-width: 128px; }
#chat button[aria-label="Clear"], #chat button[aria-label="Share"] { display: none; }
input[type="radio"]:checked { /* under the mouse, too */
  background-color: var(--checkbox-background-color-selected) !important;
  background-image: var(--radio-circle) !important;
  border-color: var(--checkbox-border-color-selected) !important;
}
#remark p { margin: 0; min-height: 1.4em; font-size: .9rem; overflow-wrap: anywhere; }
#remark .error { color: #b42318; }
.dark #remark .error { color: #ff8a7a; }
"""


def system_theme() -> Any:
    """Return gradio's theme with fonts of the system, which take no request."""
    return gradio.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )


def build_page(sessions: Sessions, about: PageAbout) -> Any:
    """Build the page, a gradio.Blocks."""
    with gradio.Blocks(title=f"{about.name} - chat", analytics_enabled=False, fill_width=True) as blocks:
        with gradio.Row():
            with gradio.Column(scale=3, min_width=320):
                with gradio.Row(elem_id="head"):
                    gradio.HTML(_title(about), elem_id="title", padding=False)
                    anew = gradio.Button("New conversation", size="sm", elem_id="anew", min_width=150)
                chat = gradio.Chatbot(
                    show_label=False,
                    elem_id="chat",
                    height="65vh",
                    min_height=320,
                    render_markdown=False,
                    latex_delimiters=[],
                    allow_tags=False,
                    buttons=[],
                    feedback_options=None,
                    placeholder="Ask something, or ask for a picture.",
                )
                question = gradio.MultimodalTextbox(
                    show_label=False,
                    placeholder="Your question",
                    file_count="multiple",
                    file_types=["image"],
                    sources=["upload"],
                    max_plain_text_length=1_000_000,
                    autofocus=True,
                )
                remark = gradio.HTML(_line(""), elem_id="remark", padding=False)
            with gradio.Column(scale=1, min_width=280):
                fields = _fields(about)
        _connect(sessions, chat, question, remark, fields, anew)
    return blocks


def _title(about: PageAbout) -> str:
    what = "text and pictures" if about.sizes else "text"
    return (
        f"<h1>{html.escape(about.name)}</h1>"
        f"<p>{what}; a conversation may have {about.packed_length:,} tokens</p>"
    )


def _fields(about: PageAbout) -> list[Any]:
    """Make the settings, in the order of `ChatSettings`."""
    defaults, draws = ChatSettings(), bool(about.sizes)
    sizes = [AS_IN_THE_DATA, *(f"{width}x{height}" for height, width in about.sizes)]
    advice = "1 is none." if about.guidance_trained else "Trained without null prompts: leave it at 1."
    kind = gradio.Radio(KINDS, value="free" if draws else "text", label="Reply", visible=draws)
    size = gradio.Dropdown(
        sizes, value=sizes[0], label="Size of pictures", allow_custom_value=True, visible=draws
    )
    temperature = gradio.Slider(
        0, 2, defaults.temperature, step=0.05, label="Temperature", info="0 takes the likeliest."
    )
    with gradio.Row():
        top_k_text = _whole("Text from likeliest", defaults.top_k_text, "0 is all tokens.")
        top_k_image = _whole("Pictures from likeliest", defaults.top_k_image, "0 is all codes.", draws)
    guidance = gradio.Slider(
        0, 12, about.guidance, step=0.5, label="Guidance of pictures", info=advice, visible=draws
    )
    with gradio.Row():
        seed = _whole("Seed", defaults.seed)
        max_tokens = _whole("Most tokens", defaults.max_tokens)
    return [kind, size, temperature, top_k_text, top_k_image, guidance, seed, max_tokens]


def _whole(label: str, value: int, info: str | None = None, visible: bool = True) -> gradio.Number:
    return gradio.Number(value, label=label, info=info, precision=0, visible=visible, min_width=110)


def _line(text: str, failed: bool = False) -> str:
    role = ' role="alert" class="error"' if failed else ' role="status"'
    return f"<p{role}>{html.escape(text)}</p>"


def _connect(
    sessions: Sessions,
    chat: gradio.Chatbot,
    question: gradio.MultimodalTextbox,
    remark: gradio.HTML,
    fields: list[Any],
    anew: gradio.Button,
) -> None:
    def ask(request: gradio.Request, asked: dict[str, Any], *values: Any) -> Iterator[tuple[Any, ...]]:
        kind, size, *numbers = values
        size = "" if size in (None, AS_IN_THE_DATA) else str(size)
        settings = ChatSettings(kind, size, *numbers)
        cleared = False
        for shown in sessions.ask(request.session_hash, asked["text"] or "", asked["files"] or [], settings):
            yield shown.messages, _box(shown, cleared), _line(shown.remark, shown.failed)
            cleared = True

    def stop(request: gradio.Request) -> None:
        sessions.stop(request.session_hash)

    def begin_anew(request: gradio.Request) -> tuple[Any, ...]:
        sessions.begin_anew(request.session_hash)
        return [], _line("")

    question.submit(
        ask,
        [question, *fields],
        [chat, question, remark],
        concurrency_limit=MOST_SESSIONS,
        show_progress="hidden",
    )
    question.stop(stop, concurrency_limit=None, show_progress="hidden")
    anew.click(begin_anew, None, [chat, remark], concurrency_limit=None, show_progress="hidden")


def _box(shown: Shown, cleared: bool) -> Any:
    """Return the change of the question's box: emptied at the first sign of a reply, closed until its end."""
    change: dict[str, Any] = {"submit_btn": not shown.busy, "stop_btn": shown.busy}
    if not cleared and not shown.failed:
        change["value"] = {"text": "", "files": []}
    return gradio.MultimodalTextbox(**change)
