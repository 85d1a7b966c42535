//! `tailnode`: what the nodes of this host's containers are doing, and why.

mod login;
mod migrate;
mod state;
mod status;

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use tailnode_plugin::{
    api::{self, ContainerStatus, Request, Response, is_called},
    options::manual,
};

/// For the daemon to answer; it does so from memory.
const PATIENCE: Duration = Duration::from_secs(10);
const OTHER_ANSWER: &str = "tailnoded gave an answer to something else: is it of another version?";

/// Containers as nodes of a tailnet.
///
/// It asks tailnoded at $TAILNODE_SOCKET, else for root that of the host, at /run/tailnode/tailnoded.sock, and for
/// anybody else their own, at $XDG_RUNTIME_DIR/tailnode/tailnoded.sock.
#[derive(Parser)]
#[command(name = "tailnode", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// What programs may rely on.
const CONTRACT: &str = "\
JSON is a list with one object for each network of each container, by the container's name. What is
named here stays; more may come.
  container, container_id, network
  engine               podman or docker
  interface            the device in the container; empty when it is gone
  node                 hostname, name, addresses, login_server, home_relay, health, rx_bytes, tx_bytes
  node.login.state     starting, needs-login (with url and reason), needs-approval, running, offline (with error),
                       refused (with error), expired, stopped
  node.routes          what it offers: routed and unconfirmed; exit_node: the one that it is to use;
                       exits: whether it does
  node.peers           of each: name, addresses, online (null: not said), routes, rx_bytes, tx_bytes
  node.peers[].path    via: idle, direct (with address) or relay (with region)

Exit status: 0 done; 1 no answer from tailnoded, or no such container; 2 wrong usage.";

/// What `login` does.
const LOGIN: &str = "\
With NETWORK it asks for an auth key, or an OAuth client's secret, without showing it; where its input is no
terminal, it reads it from there. tailnoded keeps it, readable by nobody else, for the nodes that join the networks
of this name from now on, unless the network's own option auth-key names another.

With --wait it waits until nobody must log in for the container, or for any, and prints the pages to open.

Exit status: 0 done; 1 not done, or not within --timeout; 2 wrong usage.";

#[derive(Subcommand)]
enum Command {
    /// Show the containers' nodes and their peers.
    #[command(after_long_help = CONTRACT)]
    Status {
        /// Only the container of this name, or of an id that begins so.
        container: Option<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Give a network its auth key, or wait until somebody has logged in.
    #[command(after_long_help = LOGIN)]
    #[command(group(clap::ArgGroup::new("what").required(true).args(["network", "wait"])))]
    Login {
        /// The network that the key is for.
        network: Option<String>,
        /// Forget the network's key.
        #[arg(long, requires = "network", conflicts_with = "wait")]
        remove: bool,
        /// Wait for the container of this name, or of an id that begins so; else for all.
        #[arg(long, value_name = "CONTAINER", num_args = 0..=1)]
        wait: Option<Option<String>>,
        /// For how many seconds at most; else for as long as it takes.
        #[arg(
            long,
            value_name = "SECONDS",
            requires = "wait",
            conflicts_with = "network"
        )]
        timeout: Option<u64>,
    },
    /// Show what is set for a container's nodes, and who set it.
    Explain {
        /// Its name, or the beginning of its id.
        container: String,
        /// Print JSON: of each network its container, container_id, engine, network and options, and
        /// of each option key, value, origin and locked_by.
        #[arg(long)]
        json: bool,
    },
    /// List the options that a network, a container or the host can set.
    Options {
        /// Print the manual page, for man(1).
        #[arg(long)]
        man: bool,
    },
    /// Log a node out of its tailnet for good, and remove its keys.
    ///
    /// Its container must not run. When it starts again, it is a new node. The control server lists
    /// the old one as expired until it is deleted there; an ephemeral one it forgets.
    Forget {
        /// The node's hostname, or the name of the container that had it last.
        node: String,
        /// Its network, where nodes of several are called so.
        #[arg(long)]
        network: Option<String>,
        /// Only remove the keys here: the node runs on another host now, or its keys are damaged.
        #[arg(long)]
        local: bool,
    },
    /// Move a node to another host, with its name and addresses.
    #[command(subcommand)]
    State(State),
    /// Take a container out of its tailnets until it is started again.
    Logout {
        /// Its name, or the beginning of its id.
        container: String,
    },
    /// Move over from what people use instead.
    #[command(subcommand)]
    Migrate(Migrate),
}

#[derive(Subcommand)]
enum Migrate {
    /// Print a compose file with Tailscale sidecars as one without.
    ///
    /// What has no equivalent is said on standard error. The file itself stays as it is, and no
    /// auth key is printed or taken over.
    Compose {
        /// The compose file; - is standard input.
        file: PathBuf,
    },
}

#[derive(Subcommand)]
enum State {
    /// Write a node and its keys to a file; its container must not run.
    Export {
        /// The node's hostname, or the name of the container that had it last.
        node: String,
        /// Where to; `-` is standard output. It must not exist yet, and is for its owner alone.
        file: PathBuf,
        /// The node's network, where nodes of several are called so.
        #[arg(long)]
        network: Option<String>,
    },
    /// Take a node from a file: the next container of its hostname is this node.
    Import {
        /// What was exported; `-` is standard input.
        file: PathBuf,
        /// The network that it is to be on, where it is called otherwise on this host.
        #[arg(long)]
        network: Option<String>,
    },
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Status { container, json } => status(container.as_deref(), json),
        Command::Login {
            wait: Some(container),
            timeout,
            ..
        } => login::wait(container.as_deref(), timeout.map(Duration::from_secs)),
        Command::Login {
            network, remove, ..
        } => login::give(network.unwrap_or_default(), remove),
        Command::Explain { container, json } => explain(container, json),
        Command::Options { man: false } => print(&manual::text()),
        Command::Options { man: true } => print(&manual::page()),
        Command::Forget {
            node,
            network,
            local,
        } => state::forget(node, network, local),
        Command::State(State::Export {
            node,
            file,
            network,
        }) => state::export(node, network, &file),
        Command::State(State::Import { file, network }) => state::import(file, network),
        Command::Logout { container } => tell(Request::Logout { container }),
        Command::Migrate(Migrate::Compose { file }) => migrate_compose(&file),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tailnode: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn explain(container: String, json: bool) -> anyhow::Result<()> {
    let request = Request::Explain { container };
    let response = api::call(&api::socket_path(), &request, None, PATIENCE)?;
    let Response::Explained(list) = response else {
        bail!(OTHER_ANSWER);
    };
    print(&match json {
        true => serde_json::to_string_pretty(&list)? + "\n",
        false => status::render_options(&list),
    })
}

fn tell(request: Request) -> anyhow::Result<()> {
    match api::call(&api::socket_path(), &request, None, PATIENCE)? {
        Response::Ok => Ok(()),
        _ => bail!(OTHER_ANSWER),
    }
}

/// The nodes of a container, or of all.
fn nodes(container: Option<&str>) -> anyhow::Result<Vec<ContainerStatus>> {
    let response = api::call(&api::socket_path(), &Request::Status, None, PATIENCE)?;
    let Response::Status(mut list) = response else {
        bail!(OTHER_ANSWER);
    };
    if let Some(wanted) = container {
        list.retain(|status| is_called(&status.container, &status.container_id, wanted));
        if list.is_empty() {
            bail!(
                "no container called {wanted} has a node; `tailnode status` lists those that have"
            );
        }
    }
    Ok(list)
}

fn status(container: Option<&str>, json: bool) -> anyhow::Result<()> {
    let list = nodes(container)?;
    print(&match json {
        true => serde_json::to_string_pretty(&list)? + "\n",
        false => status::render(&list),
    })
}

fn migrate_compose(file: &Path) -> anyhow::Result<()> {
    let text = match file == Path::new("-") {
        true => io::read_to_string(io::stdin()),
        false => fs::read_to_string(file),
    };
    let text = text.with_context(|| format!("{} cannot be read", file.display()))?;
    let migration = migrate::compose(&text).with_context(|| file.display().to_string())?;
    print(&migration.text)?;
    for remark in &migration.remarks {
        eprintln!("tailnode: {remark}");
    }
    Ok(())
}

fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        // The reader has seen enough, as with `| head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;
    use tailnode_node::{Login, PeerPath, PeerStatus, RouteStatus, Status};
    use tailnode_plugin::api::Engine;

    use super::*;

    fn words_of(value: &Value, words: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    words.insert(name.clone());
                    words_of(value, words);
                }
            }
            Value::Array(values) => values.iter().for_each(|value| words_of(value, words)),
            _ => {}
        }
    }

    #[test]
    fn help_names_every_field_and_every_state() {
        let peer = |path| PeerStatus {
            name: String::new(),
            addresses: Vec::new(),
            online: None,
            routes: Vec::new(),
            path,
            rx_bytes: 0,
            tx_bytes: 0,
        };
        let container = |login| ContainerStatus {
            container: String::new(),
            container_id: String::new(),
            engine: Engine::Docker,
            network: String::new(),
            interface: String::new(),
            node: Status {
                hostname: String::new(),
                name: String::new(),
                addresses: Vec::new(),
                login,
                login_server: String::new(),
                home_relay: String::new(),
                health: Vec::new(),
                routes: RouteStatus::default(),
                peers: vec![
                    peer(PeerPath::Idle),
                    peer(PeerPath::Direct {
                        address: "10.0.0.1:1".parse().unwrap(),
                    }),
                    peer(PeerPath::Relay {
                        region: String::new(),
                    }),
                ],
                rx_bytes: 0,
                tx_bytes: 0,
            },
        };
        let (url, error) = (String::new(), String::new());
        let list = [
            Login::Starting,
            Login::NeedsLogin {
                url,
                reason: String::new(),
            },
            Login::NeedsApproval,
            Login::Running,
            Login::Offline {
                error: error.clone(),
            },
            Login::Refused { error },
            Login::Expired,
            Login::Stopped,
        ]
        .map(container);
        let mut words = BTreeSet::new();
        let json = serde_json::to_value(&list).unwrap();
        words_of(&json, &mut words);
        for status in json.as_array().unwrap() {
            words.extend(status["node"]["login"]["state"].as_str().map(String::from));
            words.extend(status["engine"].as_str().map(String::from));
        }
        for peer in json[0]["node"]["peers"].as_array().unwrap() {
            words.extend(peer["path"]["via"].as_str().map(String::from));
        }
        assert!(words.contains("needs-approval") && words.contains("relay"));
        for word in words {
            let named = CONTRACT
                .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '-'))
                .any(|named| named == word);
            assert!(named, "--help does not name {word}");
        }
    }
}
