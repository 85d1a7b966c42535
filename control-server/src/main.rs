//! `tailnode-control`: the coordination server and its administration.

use std::{
    collections::BTreeSet,
    io::{IsTerminal, Write},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::{anyhow, bail};
use chrono::{DateTime, Utc};
use clap::{Args, Parser, Subcommand};
use ipnet::IpNet;
use tailnode_control_server::{
    Config, DEFAULT_DOMAIN, KeySpec, Names, Server, TlsFiles,
    admin::{self, Answer, Request},
    read_policy,
};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use url::Url;

/// A small coordination server for Tailscale nodes, with DERP and STUN: for one host, a LAN, CI or
/// an air-gapped site.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the server.
    Serve(Box<Serve>),
    /// Auth keys, by which nodes join.
    #[command(subcommand)]
    Key(KeyCommand),
    /// The nodes that have joined or want to.
    #[command(subcommand)]
    Node(NodeCommand),
    /// The subnets and exits that nodes offer; `node list` shows them.
    #[command(subcommand)]
    Route(RouteCommand),
    /// Who may reach whom.
    #[command(subcommand)]
    Policy(PolicyCommand),
}

#[derive(Args)]
struct Serve {
    #[command(flatten)]
    state: StateDir,
    /// Where HTTP (control and DERP) listens.
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Where STUN listens, by UDP.
    #[arg(long, default_value = "127.0.0.1:3478")]
    stun: SocketAddr,
    /// How nodes reach the server (default: http:// or https:// and the address it listens on).
    #[arg(long)]
    url: Option<Url>,
    /// Suffix of all names.
    #[arg(long, default_value = DEFAULT_DOMAIN)]
    domain: String,
    /// Who may reach whom, in HuJSON; SIGHUP reads it again (default: everyone, everyone).
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Another name of the tailnet, NAME=ADDRESS; may be repeated.
    #[arg(long = "record", value_name = "NAME=ADDRESS", value_parser = record)]
    records: Vec<(String, IpAddr)>,
    /// A DNS server for the names of a zone, ZONE=ADDRESS; may be repeated.
    #[arg(long = "split-dns", value_name = "ZONE=ADDRESS", value_parser = record)]
    split_dns: Vec<(String, IpAddr)>,
    /// Serve HTTPS with this certificate: PEM, the certificates that lead to its CA after it.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's key: PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Further relays, as JSON in the form of Tailscale's DERP map.
    #[arg(long, value_name = "FILE")]
    derp_map: Option<PathBuf>,
}

#[derive(Args)]
struct StateDir {
    /// The state directory.
    #[arg(
        long = "state",
        value_name = "DIR",
        default_value = "/var/lib/tailnode-control"
    )]
    dir: PathBuf,
}

#[derive(Subcommand)]
enum KeyCommand {
    /// Make a key and print it; it cannot be shown again.
    Create(CreateKey),
    /// Show all keys, without their secrets.
    List(StateDir),
    /// End a key; nodes that joined with it stay.
    Expire {
        /// As `key list` shows it.
        id: String,
        #[command(flatten)]
        state: StateDir,
    },
}

#[derive(Args)]
struct CreateKey {
    /// Admit any number of nodes.
    #[arg(long)]
    reusable: bool,
    /// Remove its nodes when they are gone.
    #[arg(long)]
    ephemeral: bool,
    /// Give its nodes this tag; may be repeated.
    #[arg(long = "tag", value_name = "TAG")]
    tags: Vec<String>,
    /// End it after this time, such as 30m, 24h or 90d; or never.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = lifetime)]
    expires: Lifetime,
    /// Login name of its nodes' owner (default: user@DOMAIN).
    #[arg(long)]
    user: Option<String>,
    #[command(flatten)]
    state: StateDir,
}

#[derive(Subcommand)]
enum NodeCommand {
    /// Show all nodes.
    List {
        /// As JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        state: StateDir,
    },
    /// Forget a node.
    Delete {
        /// Its number.
        id: i64,
        #[command(flatten)]
        state: StateDir,
    },
    /// Make a node log in again.
    Expire {
        /// Its number.
        id: i64,
        #[command(flatten)]
        state: StateDir,
    },
    /// Call a node otherwise; it keeps the name until it asks for another itself.
    Rename {
        /// Its number.
        id: i64,
        /// One label, such as web.
        name: String,
        #[command(flatten)]
        state: StateDir,
    },
    /// Let a node in that waits.
    Approve {
        /// The last part of the URL that the node shows.
        id: String,
        /// Login name of its owner (default: user@DOMAIN).
        #[arg(long)]
        user: Option<String>,
        #[command(flatten)]
        state: StateDir,
    },
}

#[derive(Subcommand)]
enum RouteCommand {
    /// Let a node route what it offers; autoApprovers in the policy do so without being asked.
    Approve(Routes),
    /// Take an approval back.
    Revoke(Routes),
}

#[derive(Args)]
struct Routes {
    /// The node's number.
    node: i64,
    /// Such as 10.0.0.0/24; 0.0.0.0/0 for an exit.
    #[arg(required = true)]
    routes: Vec<IpNet>,
    #[command(flatten)]
    state: StateDir,
}

#[derive(Subcommand)]
enum PolicyCommand {
    /// Say what is wrong with a policy file, if anything is.
    Check {
        /// The policy, in HuJSON.
        file: PathBuf,
    },
    /// Enforce a policy, now and after a restart.
    Set {
        /// The policy, in HuJSON.
        file: PathBuf,
        #[command(flatten)]
        state: StateDir,
    },
}

/// A name and an address, parted by `=`.
fn record(text: &str) -> Result<(String, IpAddr), String> {
    let (name, address) = text.split_once('=').unwrap_or_default();
    match address.parse() {
        Ok(address) if !name.is_empty() => Ok((name.to_owned(), address)),
        _ => Err("write a name and an address, such as wiki.example.org=192.0.2.7".to_owned()),
    }
}

/// How long a key is good; `None`: for ever.
#[derive(Clone, Copy)]
struct Lifetime(Option<Duration>);

fn lifetime(text: &str) -> Result<Lifetime, String> {
    if text == "never" {
        return Ok(Lifetime(None));
    }
    let bad = || "write a time as 30m, 24h or 90d, or never".to_owned();
    let unit = text.chars().last().ok_or_else(bad)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86400,
        _ => return Err(bad()),
    };
    let count: u32 = text[..text.len() - 1].parse().map_err(|_| bad())?;
    Ok(Lifetime(Some(Duration::from_secs(
        u64::from(count) * seconds,
    ))))
}

impl Lifetime {
    fn end(self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        self.0.map(|lifetime| now + lifetime)
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Cli::parse().command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The message says it all; a backtrace would bury it.
            eprintln!("tailnode-control: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(args) => serve(*args).await,
        Command::Policy(PolicyCommand::Check { file }) => Ok(read_policy(&file).map(drop)?),
        Command::Policy(PolicyCommand::Set { file, state }) => {
            let text = std::fs::read_to_string(&file)
                .map_err(|error| anyhow!("policy file {}: {error}", file.display()))?;
            ask(state, Request::SetPolicy { text }).await
        }
        Command::Route(RouteCommand::Approve(args)) => {
            let (id, routes) = (args.node, args.routes);
            ask(args.state, Request::ApproveRoutes { id, routes }).await
        }
        Command::Route(RouteCommand::Revoke(args)) => {
            let (id, routes) = (args.node, args.routes);
            ask(args.state, Request::RevokeRoutes { id, routes }).await
        }
        Command::Key(KeyCommand::Create(args)) => {
            let spec = KeySpec {
                reusable: args.reusable,
                ephemeral: args.ephemeral,
                tags: BTreeSet::from_iter(args.tags),
                expires: args.expires.end(Utc::now()),
                user: args.user,
            };
            ask(args.state, Request::CreateKey(spec)).await
        }
        Command::Key(KeyCommand::List(state)) => ask(state, Request::ListKeys).await,
        Command::Key(KeyCommand::Expire { id, state }) => {
            ask(state, Request::ExpireKey { id }).await
        }
        Command::Node(NodeCommand::List { json: false, state }) => {
            ask(state, Request::ListNodes).await
        }
        Command::Node(NodeCommand::List { json: true, state }) => {
            match admin::ask(&state.dir, Request::ListNodes).await? {
                Answer::Nodes(nodes) => print(&serde_json::to_string_pretty(&nodes)?),
                other => bail!("unexpected answer {other:?}"),
            }
        }
        Command::Node(NodeCommand::Delete { id, state }) => {
            ask(state, Request::DeleteNode { id }).await
        }
        Command::Node(NodeCommand::Expire { id, state }) => {
            ask(state, Request::ExpireNode { id }).await
        }
        Command::Node(NodeCommand::Rename { id, name, state }) => {
            ask(state, Request::RenameNode { id, name }).await
        }
        Command::Node(NodeCommand::Approve { id, user, state }) => {
            ask(state, Request::ApproveNode { id, user }).await
        }
    }
}

/// Asks, and shows the answer to a person.
async fn ask(state: StateDir, request: Request) -> anyhow::Result<()> {
    match admin::ask(&state.dir, request).await? {
        Answer::Done => Ok(()),
        Answer::Key(key) => print(&key),
        Answer::Node(id) => print(&format!("node {id} has joined")),
        Answer::Keys(keys) => {
            for key in keys {
                let mut notes = vec![if key.reusable { "reusable" } else { "one-off" }.to_owned()];
                notes.extend(key.ephemeral.then(|| "ephemeral".to_owned()));
                notes.extend(key.used.then(|| "used".to_owned()));
                notes.extend(key.expires.map(|at| {
                    let tense = if at <= Utc::now() {
                        "expired"
                    } else {
                        "expires"
                    };
                    format!("{tense} {}", at.format("%F %T UTC"))
                }));
                notes.extend(key.tags);
                print(&format!("{}\t{}\t{}", key.id, key.user, notes.join(", ")))?;
            }
            Ok(())
        }
        Answer::Nodes(nodes) => {
            for node in nodes {
                let addresses: Vec<_> = node.addresses.iter().map(ToString::to_string).collect();
                let mut notes = vec![if node.online { "online" } else { "offline" }.to_owned()];
                notes.extend(node.ephemeral.then(|| "ephemeral".to_owned()));
                notes.extend(node.expired.then(|| "expired".to_owned()));
                notes.extend(node.tags);
                notes.extend(node.routes.iter().map(|route| {
                    let net = route.route;
                    let state = match (route.approved, route.primary) {
                        (false, _) => " (not approved)",
                        (true, false) if net.prefix_len() != 0 => " (stand-by)",
                        _ => "",
                    };
                    format!("routes {net}{state}")
                }));
                let (id, name, user) = (node.id, node.name, node.user);
                let (addresses, notes) = (addresses.join(","), notes.join(", "));
                print(&format!("{id}\t{name}\t{addresses}\t{user}\t{notes}"))?;
            }
            Ok(())
        }
        Answer::Refused(why) => bail!(why),
    }
}

/// `println!` would panic when the reader of a pipe is gone.
fn print(line: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}

async fn serve(args: Serve) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();

    let mut hangup = signal(SignalKind::hangup())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut names = Names {
        records: args.records,
        ..Names::default()
    };
    for (zone, server) in args.split_dns {
        names.split.entry(zone).or_default().push(server);
    }
    let server = Server::start(Config {
        listen: args.listen,
        stun: Some(args.stun),
        url: args.url,
        state: args.state.dir,
        domain: args.domain,
        policy: args.policy,
        names,
        tls: args
            .tls_cert
            .zip(args.tls_key)
            .map(|(cert, key)| TlsFiles { cert, key }),
        derp_map: args.derp_map,
    })
    .await?;
    tracing::info!("serving at {}", server.url());
    loop {
        tokio::select! {
            _ = hangup.recv() => match server.reload_policy() {
                Ok(()) => tracing::info!("policy read again"),
                Err(error) => tracing::error!("the old policy stays: {error}"),
            },
            _ = terminate.recv() => break,
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    server.shutdown().await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn records_have_a_name_and_an_address() {
        let wiki = ("wiki.example".to_owned(), IpAddr::from([192, 0, 2, 7]));
        assert_eq!(record("wiki.example=192.0.2.7"), Ok(wiki));
        assert!(record("wiki=fd00::1").is_ok_and(|(_, ip)| ip.is_ipv6()));
        for bad in ["", "wiki", "=192.0.2.7", "wiki=web"] {
            assert!(record(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_are_written_with_a_unit() {
        let seconds = |text| lifetime(text).map(|l| l.0.map(|d| d.as_secs()));
        assert_eq!(seconds("30m"), Ok(Some(1800)));
        assert_eq!(seconds("90d"), Ok(Some(90 * 86400)));
        assert_eq!(seconds("never"), Ok(None));
        for bad in ["", "h", "24", "-1h", "1é"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
