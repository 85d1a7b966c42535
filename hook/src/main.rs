//! `tailnode-hook STAGE`, which an OCI engine runs for containers with annotations of ours.
//!
//! `tailscale.tun=true` gives a container that brings a tunnel of its own what it needs for that:
//! before the runtime makes the container, its configuration is edited. Any other `tailscale.KEY` is
//! an option of a node, and asks for one whatever network the container is on: when its namespaces
//! are made and its process has not started, it joins; when it has stopped, its node ends.
//!
//! Where an identity was asked for and cannot be given, the container does not start.

mod complaint;
mod config;
mod image;
mod resolver;
mod wish;

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fs,
    io::{self, Read, Write},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    process::ExitCode,
};

use config::Config;
use oci_spec::runtime::State;
use serde::de::DeserializeOwned;
use tailnode_plugin::{api, shim::Place};
use tailnode_tun::Netns;
use wish::Wish;

/// What the daemon calls the network of the containers that join so.
const NETWORK: &str = "annotation";

/// In the container's bundle: the socket of the daemon that was asked for its node. Podman runs poststop
/// without its environment, which says whose daemon that is.
const ASKED: &str = "tailnode.asked";

const USAGE: &str = "the engine runs this program by itself, as `tailnode-hook precreate`, \
                     `createRuntime` or `poststop`: see /usr/share/containers/oci/hooks.d";

fn main() -> ExitCode {
    let stage = env::args().nth(1).unwrap_or_default();
    let result = match stage.as_str() {
        "precreate" => precreate(),
        "createRuntime" => create_runtime(),
        "poststop" => post_stop(),
        _ => Err(USAGE.into()),
    };
    let Err(message) = result else {
        return ExitCode::SUCCESS;
    };
    complaint::say(&format!("tailnode-hook: {message}"));
    ExitCode::FAILURE
}

/// Podman shows its configuration of the container, and takes what comes back for it. It shows
/// nobody what is said here, so what is wrong is left to the next stage to say.
fn precreate() -> Result<(), String> {
    let text = input_text()?;
    let mut config = Config::read(&text)?;
    let annotations = config.annotations()?;
    let edited = match Wish::of(&annotations) {
        Ok(wish) if image::allows(&annotations, config.root()).is_ok() => {
            let edited = wish.tun && config.give_tun(has_devices()?)?;
            // On a tailnet already, it keeps what Podman makes.
            let joins = wish.joins && !has_tailnet(config.netns())?;
            let made = joins && give_resolv_conf(&mut config)?;
            edited || made
        }
        _ => false,
    };
    // Nothing of ours, and it goes back as it came.
    let answer = if edited { config.to_string() } else { text };
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(answer.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|error| format!("cannot answer the engine: {error}"))
}

/// Whether who is root here may make device nodes: not in a user namespace, as with Podman without root.
fn has_devices() -> Result<bool, String> {
    let map = fs::read_to_string("/proc/self/uid_map")
        .map_err(|error| format!("cannot read whose root this is: {error}"))?;
    Ok(is_of_everybody(&map))
}

/// Whether a user namespace with this map of users is the host's.
fn is_of_everybody(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// Whether a device of a tailnet is in the namespace at this path.
fn has_tailnet(netns: Option<&Path>) -> Result<bool, String> {
    let Some(netns) = netns else {
        return Ok(false);
    };
    let netns = Netns::open(netns).map_err(|error| error.to_string())?;
    let inside = netns.run(|| is_on_a_tailnet("thread-self"));
    inside.map_err(|error| error.to_string())?
}

/// The container gets a resolv.conf to be filled in when its node is up.
fn give_resolv_conf(config: &mut Config) -> Result<bool, String> {
    let Some(file) = config.give_resolv_conf() else {
        return Ok(false);
    };
    // One of an earlier start may be Podman's too.
    let made = match fs::remove_file(&file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => fs::File::create(&file),
    };
    made.map_err(|error| format!("cannot make {}: {error}", file.display()))?;
    Ok(true)
}

/// The container's namespaces are there, and its process waits for us.
fn create_runtime() -> Result<(), String> {
    let state: State = input()?;
    let annotations = annotations(&state);
    if !wish::is_any(&annotations) {
        return Ok(());
    }
    let place = place(&state, &annotations);
    join(&state, &annotations, &place)
        .map_err(|message| format!("container {}: {message}", short(state.id())))
}

fn join(
    state: &State,
    annotations: &BTreeMap<String, String>,
    place: &Place,
) -> Result<(), String> {
    let wish = Wish::of(annotations)?;
    let bundle = state.bundle().join("config.json");
    let text = fs::read_to_string(&bundle)
        .map_err(|error| format!("cannot read {}: {error}", bundle.display()))?;
    let config = Config::read(&text)?;
    let pid = match *state.pid() {
        Some(pid) if pid > 0 => pid,
        _ => return Err("the engine does not say which process it is".into()),
    };
    if wish.joins && is_on_a_tailnet(&pid.to_string())? {
        // By a network of the engine's. The annotations are options there.
        return Ok(());
    }
    image::allows(annotations, config.root())?;
    if !wish.joins {
        return Ok(());
    }
    let netns = PathBuf::from(format!("/proc/{pid}/ns/net"));
    let id = |netns: Result<Netns, _>| {
        let netns = netns.map_err(|error: tailnode_tun::Error| error.to_string())?;
        Ok::<_, String>(netns.id())
    };
    if id(Netns::open(&netns))? == id(Netns::current())? {
        return Err(
            "it has the host's network, and its node would be the host's: \
                    use another --network, such as none"
                .into(),
        );
    }
    if config.network_comes_later() && place.is_connected().map_err(|error| error.to_string())? {
        return Err(
            "it has a user namespace, and so is given its networks too late to tell \
                    whether one is a tailnet: use `--network none`, or `--network NAME` of a \
                    tailnet and `--label tailscale.…` in place of `--annotation tailscale.…`"
                .into(),
        );
    }
    let inside = Netns::open(&netns).map_err(|error| error.to_string())?;
    let asked = state.bundle().join(ASKED);
    fs::write(&asked, api::socket_path().as_os_str().as_bytes())
        .map_err(|error| format!("cannot write {}: {error}", asked.display()))?;
    let attached = place.attach(&inside).map_err(|error| error.to_string())?;
    let resolv_conf = config.resolv_conf();
    let written = resolv_conf.map_or(Ok(()), |file| {
        resolver::write(
            &file,
            state.id(),
            &attached.dns_servers,
            &attached.search_domains,
        )
    });
    written.map_err(|error| match place.detach() {
        Ok(()) => error,
        Err(also) => format!("{error}; and cleaning up: {also}"),
    })
}

/// The engine asks for this after a start that failed, too: there is nothing to fail for.
fn post_stop() -> Result<(), String> {
    let state: State = input()?;
    if let Err(message) = end(&state) {
        eprintln!("tailnode-hook: container {}: {message}", short(state.id()));
    }
    Ok(())
}

fn end(state: &State) -> Result<(), String> {
    let asked = state.bundle().join(ASKED);
    let failed = |what, error| format!("cannot {what} {}: {error}", asked.display());
    let socket = match fs::read(&asked) {
        Ok(socket) => PathBuf::from(OsString::from_vec(socket)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("read", error)),
    };
    fs::remove_file(&asked).map_err(|error| failed("remove", error))?;
    let detached = place(state, &BTreeMap::new()).detach_from(&socket);
    detached.map_err(|error| error.to_string())
}

/// Whether a device of a tailnet is in the namespace of this process.
fn is_on_a_tailnet(process: &str) -> Result<bool, String> {
    let path = format!("/proc/{process}/net/dev");
    let devices =
        fs::read_to_string(&path).map_err(|error| format!("cannot read {path}: {error}"))?;
    let mut names = devices.lines().filter_map(|line| line.split_once(':'));
    Ok(names.any(|(name, _)| {
        let number = name.trim().strip_prefix("tailscale");
        number.is_some_and(|number| number.parse::<u32>().is_ok())
    }))
}

fn place(state: &State, annotations: &BTreeMap<String, String>) -> Place {
    Place {
        container_id: state.id().clone(),
        network_id: NETWORK.into(),
        network_name: NETWORK.into(),
        annotations: annotations.clone(),
        ..Place::default()
    }
}

fn annotations(state: &State) -> BTreeMap<String, String> {
    let annotations = state.annotations().clone();
    annotations.into_iter().flatten().collect()
}

fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

fn input<T: DeserializeOwned>() -> Result<T, String> {
    serde_json::from_str(&input_text()?).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        format!("cannot understand the engine's state from line {line} column {column} on")
    })
}

fn input_text() -> Result<String, String> {
    let mut text = String::new();
    match io::stdin().read_to_string(&mut text) {
        Ok(_) => Ok(text),
        Err(error) => Err(format!("cannot read what the engine says: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_user_namespace_is_told_from_others() {
        assert!(is_of_everybody("         0          0 4294967295\n"));
        let users = "         0       1000          1\n         1     100000      65536\n";
        assert!(!is_of_everybody(users));
        assert!(!is_of_everybody(""));
    }
}
