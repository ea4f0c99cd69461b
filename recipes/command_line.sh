# Sourced by each recipe's run.sh: takes its words apart into `flags`, hydra's own options (`--cfg job`), which have to
# stand together before the settings, wherever they were written; and "$@", the settings.
words=() flags=()
for word in "$@"; do
    if [[ "$word" == --no-import-fix ]]; then
        export ASCEND_SAFE_IMPORT_FIX=0
    elif [[ "$word" == -* || (${#flags[@]} -gt 0 && "$last" == -* && "$word" != *=*) ]]; then
        flags+=("$word")
    else
        words+=("$word")
    fi
    last="$word"
done
set -- ${words[@]+"${words[@]}"}
