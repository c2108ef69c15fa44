"""How well-known chat templates behave, as small templates of our own over the test tokenizer."""

from __future__ import annotations

# Headers, trimmed texts, and no line break behind the end of a turn; function calls in a role of
# their own.
LLAMA_3 = """{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n\\n' }}
{%- if m.tool_calls %}{{- m.tool_calls[0].function | tojson }}
{%- else %}{{- m.content | trim }}{%- endif %}{{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}"""

# A system turn of its own where none is given; tools in it; calls between tags behind the content.
QWEN_25 = """{%- if messages[0].role == 'system' %}{%- set first = messages[0].content %}
{%- else %}{%- set first = 'You are a helpful assistant.' %}{%- endif %}
{{- '<|im_start|>system\\n' + first }}
{%- for tool in tools or [] %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif m.role != 'system' or not loop.first %}{{- '<|im_start|>' + m.role }}
{%- if m.content %}{{- '\\n' + m.content }}{%- endif %}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Thinking of the turns after the last question is kept, as content or as a key, and earlier
# thinking is dropped; the last answer always has a think block; with enable_thinking=False the
# prompt holds an empty one.
QWEN_3 = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
{%- set content = m.content %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{%- set thinking = '' %}
{%- if m.reasoning_content is string %}{%- set thinking = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thinking = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > ns.last and (loop.last or thinking) %}
{{- '<think>\\n' + thinking.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- content }}{%- endif %}
{%- else %}{{- content }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""

# The system text stands in the last message where that is a user's, and nowhere else; a space
# before each answer, which is trimmed.
MISTRAL = """{%- set said = messages %}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}
{%- set said = messages[1:] %}{%- endif %}
{%- for m in said %}
{%- if m.role == 'user' and loop.last and system is defined %}
{{- '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}
{%- elif m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}
{%- else %}{{- ' ' + m.content | trim + '<|im_end|>' }}{%- endif %}
{%- endfor %}"""

_GEMMA = """{%- for m in said %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{%- endif %}
{{- '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- (first if loop.first else '') + m.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>model\\n' }}{%- endif %}"""

# No system role at all.
GEMMA_2 = (
    """{%- if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{%- endif %}
{%- set said = messages %}{%- set first = '' %}"""
    + _GEMMA
)

# The system text stands before the first question; texts are trimmed.
GEMMA_3 = (
    """{%- set said = messages %}{%- set first = '' %}
{%- if messages[0].role == 'system' %}{%- set first = messages[0].content + '\\n\\n' %}
{%- set said = messages[1:] %}{%- endif %}"""
    + _GEMMA
)

# Thinking is cut from every answer, and the prompt opens the next.
R1 = """{%- for m in messages %}{%- set content = m.content %}
{%- if m.role == 'assistant' and '</think>' in content %}
{%- set content = content.split('</think>')[-1] %}{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""

# The system text is dropped.
WITHOUT_SYSTEM = """{%- for m in messages if m.role != 'system' %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Spaces around each answer, and the system text between tags in the first question.
LLAMA_2 = """{%- set said = messages %}{%- set first = '' %}
{%- if messages[0].role == 'system' %}{%- set said = messages[1:] %}
{%- set first = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}{%- endif %}
{%- for m in said %}
{%- if m.role == 'user' %}
{{- '[INST] ' + ((first if loop.first else '') + m.content) | trim + ' [/INST]' }}
{%- else %}{{- ' ' + m.content | trim + ' <|im_end|>' }}{%- endif %}
{%- endfor %}"""

# A turn has no end of its own: the next one's header ends it (GLM).
OPEN_ENDED = """{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# The beginning of a further answer, asked for or not.
ALWAYS_ASKING = """{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}{{- '<|im_start|>assistant\\n' }}"""

# The prompt opens the thinking of the answer, and earlier thinking is dropped (Qwen 3 "Thinking").
THINKING_ONLY = QWEN_3.partition("{%- if add_generation_prompt")[0] + (
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)

TEMPLATES = {
    "llama-3": LLAMA_3,
    "qwen-2.5": QWEN_25,
    "qwen-3": QWEN_3,
    "mistral": MISTRAL,
    "gemma-2": GEMMA_2,
    "gemma-3": GEMMA_3,
    "r1": R1,
    "without-system": WITHOUT_SYSTEM,
    "llama-2": LLAMA_2,
    "open-ended": OPEN_ENDED,
    "always-asking": ALWAYS_ASKING,
    "thinking-only": THINKING_ONLY,
}
