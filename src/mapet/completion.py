"""Words that a shell may offer after `mapet`: `source <(mapet --completion bash)`."""

from mapet.commands import COMMANDS
from mapet.config.base import choices, fields
from mapet.errors import MapetError, did_you_mean

SHELLS = ("bash", "zsh", "fish")
ZSH = """(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i; }
autoload -U +X bashcompinit && bashcompinit
"""


def completion(shell: str) -> str:
    """A script for the shell.

    Raises:
        MapetError: a shell that isn't known.
    """
    if shell not in SHELLS:
        raise MapetError(f"no completion for '{shell}'{did_you_mean(shell, SHELLS) or '.'} Shells: {', '.join(SHELLS)}")
    options = {name: _options(name) for name in COMMANDS}
    if shell == "fish":
        lines = ["complete -c mapet -f -n __fish_use_subcommand -a " + repr(" ".join(COMMANDS))]
        lines += [
            f"complete -c mapet -n '__fish_seen_subcommand_from {name}' -l {option.removeprefix('--')}"
            + (f" -x -a '{' '.join(values)}'" if values else "")
            for name, words in options.items()
            for option, values in words.items()
        ]
        return "\n".join(lines) + "\n"
    cases = "\n".join(f"        {name}) offered='{' '.join(words)}' ;;" for name, words in options.items())
    fixed = "\n".join(
        f"        '{name} {option}') offered='{' '.join(values)}' ;;"
        for name, words in options.items()
        for option, values in words.items()
        if values
    )
    start = ZSH if shell == "zsh" else ""
    return f"""{start}_mapet() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" offered=''
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W '{" ".join(COMMANDS)}' -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    [[ "$word" == -* ]] || case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
{fixed}
        *) COMPREPLY=(); return ;;
    esac
    COMPREPLY=($(compgen -W "$offered" -- "$word"))
}}
complete -o default -F _mapet mapet
"""


def _options(stage: str) -> dict[str, list[str]]:
    """Option -> the values it takes, if they are fixed."""
    found = {
        option.replace("_", "-"): choices(field.annotation) for option, field in fields(COMMANDS[stage].config_type)
    }
    return {f"--{option}": found[option] for option in sorted(found)}
