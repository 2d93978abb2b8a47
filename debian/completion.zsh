# zsh runs this file for the first completion, and its function for the others.
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _xvd_completion "$@"
fi
