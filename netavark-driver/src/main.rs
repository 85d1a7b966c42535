//! `tailscale`, the network plugin through which a container gets its node: netavark's, for Podman,
//! and by the environment that it is run in also one of the Container Network Interface.
//!
//! Podman and netavark run it for every container that starts or stops, and hold a lock over all
//! containers meanwhile. So it does the little that must happen on the caller's side of the daemon
//! (making the device, where the container's namespace can be reached) and leaves at once. It
//! starts no process: one that inherited standard output would keep netavark waiting.

mod cni;
mod contract;

use std::{
    collections::BTreeMap,
    env,
    ffi::OsStr,
    io::{self, Read, Write},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use contract::{API_VERSION, Attachment, NewNetwork, StatusBlock};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use tailnode_plugin::{
    Error,
    api::{self, Engine, Request},
    options::Layer,
    shim::Place,
};
use tailnode_tun::Netns;

const CREATE_TIMEOUT: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let arguments: Vec<&OsStr> = arguments.iter().map(AsRef::as_ref).collect();
    if arguments.is_empty()
        && let Some(command) = env::var_os("CNI_COMMAND")
    {
        return cni::run(&command.to_string_lossy());
    }
    let result = match arguments.as_slice() {
        [command] if *command == "create" => input().and_then(create).and_then(print),
        [command, netns] if *command == "setup" => input()
            .and_then(|attachment| setup(Path::new(netns), &attachment))
            .and_then(print),
        [command, _netns] if *command == "teardown" => {
            input().map(|attachment| teardown(&attachment))
        }
        [command] if *command == "info" => {
            print(json!({ "version": env!("CARGO_PKG_VERSION"), "api_version": API_VERSION }))
        }
        _ => Err("Podman runs this program by itself: use \
                  `podman network create -d tailscale NAME`, then \
                  `podman run --network NAME IMAGE`"
            .into()),
    };
    let Err(message) = result else {
        return ExitCode::SUCCESS;
    };
    // The engine shows the reader of its terminal what comes in this field, and nothing else.
    if let Err(lost) = print(json!({ "error": format!("tailscale: {message}") })) {
        eprintln!("tailscale: {message} ({lost})");
    }
    ExitCode::FAILURE
}

/// `podman network create -d tailscale`: refuses what no container could use later, as far as that
/// can be told: a network can be created while the daemon is down.
fn create(network: NewNetwork) -> Result<NewNetwork, String> {
    let in_network = |message: String| format!("network {}: {message}", network.name());
    if let Some(refusal) = network.refusal() {
        return Err(in_network(refusal.into()));
    }
    // Without serde's own words, here and below: they quote what they fail on, which may
    // be a secret.
    let options = network
        .options()
        .map_err(|_| in_network("its options are no texts: is Podman at least 4.5?".into()))?;
    Layer::of_network(network.name(), &options).map_err(|error| in_network(error.to_string()))?;
    let request = Request::Allows {
        network_name: network.name().to_owned(),
        network_options: options,
    };
    if let Err(Error::Daemon { message }) =
        api::call(&api::socket_path(), &request, None, CREATE_TIMEOUT)
    {
        return Err(in_network(message));
    }
    Ok(network.without_addresses())
}

/// A container starts: makes its device and has the daemon serve it.
fn setup(netns: &Path, attachment: &Attachment) -> Result<StatusBlock, String> {
    let attached = attach(netns, attachment);
    attached.map_err(|message| format!("{}: {message}", subject(attachment)))
}

fn attach(netns: &Path, attachment: &Attachment) -> Result<StatusBlock, String> {
    let netns = Netns::open(netns).map_err(|error| error.to_string())?;
    let attached = place(attachment)
        .attach(&netns)
        .map_err(|error| error.to_string())?;
    Ok(StatusBlock::new(
        attached.device,
        attached.interface.addresses,
        attached.dns_servers,
        attached.search_domains,
    ))
}

/// A container stops. The engine asks for this more than once, and after the container's namespace
/// or the daemon has gone: there is nothing to fail for.
fn teardown(attachment: &Attachment) {
    if let Err(error) = place(attachment).detach() {
        eprintln!("tailscale: {}: {error}", subject(attachment));
    }
}

fn place(attachment: &Attachment) -> Place {
    Place {
        engine: Engine::Podman,
        container_id: attachment.container_id.clone(),
        container_name: attachment.container_name.clone(),
        network_id: attachment.network.id.clone(),
        network_name: attachment.network.name.clone(),
        network_options: attachment.network.options.clone(),
        endpoint_options: attachment.network_options.options.clone(),
        annotations: BTreeMap::new(),
        device: None,
    }
}

fn subject(attachment: &Attachment) -> String {
    let name = match attachment.container_name.as_str() {
        "" => &attachment.container_id,
        name => name,
    };
    format!("container {name} on network {}", attachment.network.name)
}

fn input<T: DeserializeOwned>() -> Result<T, String> {
    let mut text = String::new();
    io::stdin()
        .read_to_string(&mut text)
        .map_err(|error| format!("cannot read the engine's request: {error}"))?;
    serde_json::from_str(&text).map_err(|error| {
        format!(
            "cannot understand the engine's request from line {} column {} on: is Podman at least \
             4.5?",
            error.line(),
            error.column()
        )
    })
}

fn print(value: impl Serialize) -> Result<(), String> {
    let mut stdout = io::stdout().lock();
    serde_json::to_writer(&mut stdout, &value)
        .map_err(io::Error::from)
        .and_then(|()| stdout.write_all(b"\n"))
        .and_then(|()| stdout.flush())
        .map_err(|error| format!("cannot answer the engine: {error}"))
}
