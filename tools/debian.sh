# SPDX-License-Identifier: Apache-2.0
# Sourced, by bash: another Debian suite's packages, or another architecture's, from the host's own
# mirror through a private apt configuration, as if nothing were installed.

# private_apt DIRECTORY SUITE [ARCHITECTURE]: apt's state in a directory, brought up to date; the
# options that apt-get and apt-cache then need are in the array `apt`.
private_apt() {
    local cache=$1 suite=$2 architecture=${3-} mirror
    mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -m1 '/debian/*$') ||
        { echo "${0##*/}: apt has no Debian mirror configured" >&2; exit 1; }
    mkdir -p "$cache"/{lists,pool}/partial
    : >"$cache/status"
    echo "deb [${architecture:+arch=$architecture }signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]" \
        "$mirror $suite main" >"$cache/sources.list"
    apt=(-o Dir::Etc::sourcelist="$cache/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o Dir::State::lists="$cache/lists" -o Dir::State::status="$cache/status"
        -o Dir::Cache="$cache" -o Dir::Cache::archives="$cache/pool"
        -o APT::Install-Recommends=false -o APT::Sandbox::User=root -o Debug::NoLocking=1)
    [ -z "$architecture" ] ||
        apt+=(-o APT::Architecture="$architecture" -o APT::Architectures::="$architecture")
    # A day-old list is new enough; the marker is ours, because mirrors keep their own file times.
    if [ -z "$(find "$cache/listed" -mmin -1440 2>/dev/null)" ]; then
        apt-get "${apt[@]}" -qq -o APT::Update::Post-Invoke-Success= update
        touch "$cache/listed"
    fi
}
