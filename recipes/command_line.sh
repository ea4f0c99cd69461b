# Sourced by each recipe's run.sh: takes its words apart into `flags`, hydra's own options (`--cfg job`), which have to
# stand together before the settings, wherever they were written; and "$@", the settings.  `only_shows` is set where one of
# them only prints, as on a machine that has neither data nor devices: then nothing is looked for, and no folder is made.
words=() flags=() only_shows=
for word in "$@"; do
    if [[ "$word" == --no-import-fix ]]; then
        export ASCEND_SAFE_IMPORT_FIX=0
    elif [[ "$word" == -* || (${#flags[@]} -gt 0 && "$last" == -* && "$word" != *=*) ]]; then
        flags+=("$word")
        [[ ! "$word" =~ ^(-c|--cfg|-i|--info|-h|--help|--hydra-help|--version)(=.*)?$ ]] || only_shows=1
    else
        words+=("$word")
    fi
    last="$word"
done
set -- ${words[@]+"${words[@]}"}

# Each of the variables named has to be a number: bash would calculate with any text, and go on.
check_numbers() {
    local name
    for name in "$@"; do
        if [[ ! "${!name}" =~ ^[1-9][0-9]{0,8}$ ]]; then
            echo "run.sh: $name=${!name} is no whole number of at least 1" >&2
            exit 2
        fi
    done
}

# The folder as an absolute path; made, unless nothing is started.
make_folder() {
    if [[ -n "$only_shows" ]]; then
        [[ "$1" == /* ]] && echo "$1" || echo "$PWD/$1"
    else
        mkdir -p "$1" && (cd "$1" && pwd)
    fi
}
