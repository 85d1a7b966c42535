//! What the daemon tells, as text.

use std::fmt::{Display, Write};

use tailnode_node::{Login, PeerPath, PeerStatus, RouteStatus, Status};
use tailnode_plugin::api::{ContainerStatus, Explained};

/// A table of the containers, each with a table of its peers below it.
pub fn render(containers: &[ContainerStatus]) -> String {
    if containers.is_empty() {
        return "No container is on a tailnet. Start one on a network made with \
                `podman network create -d tailscale NAME`, or docker's.\n"
            .into();
    }
    let mut rows = vec![
        [
            "CONTAINER",
            "ENGINE",
            "NETWORK",
            "HOSTNAME",
            "ADDRESSES",
            "STATE",
        ]
        .map(String::from)
        .to_vec(),
    ];
    rows.extend(containers.iter().map(|status| {
        vec![
            status.container.clone(),
            status.engine.to_string(),
            status.network.clone(),
            name(&status.node).to_owned(),
            list(&status.node.addresses),
            state(&status.node.login).to_owned(),
        ]
    }));
    let mut lines = align(&rows).into_iter();
    let mut text = lines.next().unwrap_or_default() + "\n";
    for (line, status) in lines.zip(containers) {
        text += &format!("{line}\n");
        for remark in remarks(&status.node) {
            text += &format!("  ! {}\n", printable(&remark));
        }
        for line in routes(&status.node.routes) {
            text += &format!("  {}\n", printable(&line));
        }
        let peers: Vec<_> = status.node.peers.iter().map(peer).collect();
        for line in align(&peers) {
            text += &format!("  {line}\n");
        }
    }
    text
}

/// A table of each container's options on each network.
pub fn render_options(containers: &[Explained]) -> String {
    let mut text = String::new();
    for explained in containers {
        if !text.is_empty() {
            text.push('\n');
        }
        let (container, network) = (&explained.container, &explained.network);
        let title = format!("{container} ({}) on {network}", explained.engine);
        text += &format!("{}\n", printable(&title));
        let mut rows = vec![["OPTION", "VALUE", "FROM"].map(String::from).to_vec()];
        rows.extend(explained.options.iter().map(|told| {
            let from = match &told.locked_by {
                Some(who) => format!("{}; locked by {who}", told.origin),
                None => told.origin.clone(),
            };
            vec![told.key.clone(), told.value.clone(), from]
        }));
        for line in align(&rows) {
            text += &format!("{line}\n");
        }
    }
    text
}

fn name(node: &Status) -> &str {
    if node.name.is_empty() {
        &node.hostname
    } else {
        &node.name
    }
}

fn list(things: &[impl Display]) -> String {
    let texts: Vec<_> = things.iter().map(ToString::to_string).collect();
    if texts.is_empty() {
        "-".into()
    } else {
        texts.join(",")
    }
}

fn state(login: &Login) -> &'static str {
    match login {
        Login::Starting => "starting",
        Login::NeedsLogin { .. } => "needs login",
        Login::NeedsApproval => "needs approval",
        Login::Running => "running",
        Login::Offline { .. } => "offline",
        Login::Refused { .. } => "refused",
        Login::Expired => "expired",
        Login::Stopped => "stopped",
    }
}

/// What a person should know or do.
fn remarks(node: &Status) -> Vec<String> {
    let server = &node.login_server;
    let state = match &node.login {
        Login::Starting | Login::Running => None,
        Login::Stopped => {
            Some("it has left the tailnet: restart the container to join again".into())
        }
        Login::NeedsLogin { url, reason } if reason.is_empty() => {
            Some(format!("log in: open {url}"))
        }
        Login::NeedsLogin { url, reason } => {
            Some(format!("{reason}; to let it in again, open {url}"))
        }
        Login::NeedsApproval => Some(format!(
            "an administrator of {server} must approve this node"
        )),
        Login::Offline { error } => Some(format!(
            "{server} does not answer ({error}); serving from the last known map"
        )),
        Login::Refused { error } => Some(format!("{server} refused this node: {error}")),
        Login::Expired => Some(
            "its key has expired: give the network a valid auth key and restart the container"
                .into(),
        ),
    };
    state
        .into_iter()
        .chain(node.health.iter().cloned())
        .collect()
}

/// What it routes for others, and by whom everything of its own leaves.
fn routes(routes: &RouteStatus) -> Vec<String> {
    let mut lines = Vec::new();
    if !routes.routed.is_empty() {
        lines.push(format!("routes {}", list(&routes.routed)));
    }
    if !routes.unconfirmed.is_empty() {
        lines.push(format!(
            "offers to route {} (not confirmed: not approved, or another node has the turn)",
            list(&routes.unconfirmed)
        ));
    }
    if routes.exits {
        lines.push(format!("everything leaves by {}", routes.exit_node));
    }
    lines
}

fn peer(peer: &PeerStatus) -> Vec<String> {
    let path = match &peer.path {
        PeerPath::Idle if peer.online == Some(false) => "offline".into(),
        PeerPath::Idle => "idle".into(),
        PeerPath::Local => "local".into(),
        PeerPath::Direct { address } => format!("direct {address}"),
        PeerPath::Relay { region } => format!("relay \"{region}\""),
    };
    vec![
        peer.name.clone(),
        list(&peer.addresses),
        path,
        format!("rx {}", size(peer.rx_bytes)),
        format!("tx {}", size(peer.tx_bytes)),
        match peer.routes.as_slice() {
            [] => String::new(),
            routes => format!("routes {}", list(routes)),
        },
    ]
}

/// Bytes for a person: three digits and a unit.
fn size(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64;
    let mut unit = "";
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"] {
        // 1023.5 and more would be written as 1024.
        if value < 1023.5 && !unit.is_empty() {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    let digits = if value < 9.95 { 1 } else { 0 };
    format!("{value:.digits$} {unit}")
}

/// The rows as lines, every column as wide as its widest cell.
fn align(rows: &[Vec<String>]) -> Vec<String> {
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| row.iter().map(|cell| printable(cell)).collect())
        .collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    rows.iter()
        .map(|row| {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                // Writing to a String does not fail.
                let _ = write!(line, "{cell:width$}  ");
            }
            line.trim_end().to_owned()
        })
        .collect()
}

/// Without the characters that would move a terminal's cursor: names and messages come from the
/// control server.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use tailnode_plugin::{api::Engine, options::Told};

    use super::*;

    #[test]
    fn options_with_who_set_them() {
        let told = |key: &str, value: &str, origin: &str, locked_by: Option<&str>| Told {
            key: key.into(),
            value: value.into(),
            origin: origin.into(),
            locked_by: locked_by.map(String::from),
        };
        let explained = |network: &str| Explained {
            container: "ann".into(),
            container_id: "ae48c7267541".into(),
            engine: Engine::Podman,
            network: network.into(),
            options: vec![
                told("hostname", "web", "label tailscale.hostname", None),
                told("tags", "tag:\u{1b}a", "network tn", Some("network tn")),
            ],
        };
        let table = "OPTION    VALUE   FROM\n\
                     hostname  web     label tailscale.hostname\n\
                     tags      tag:\u{fffd}a  network tn; locked by network tn\n";
        assert_eq!(
            render_options(&[explained("tn"), explained("lab")]),
            format!("ann (podman) on tn\n{table}\nann (podman) on lab\n{table}")
        );
    }

    fn node(login: Login) -> Status {
        Status {
            hostname: "web".into(),
            name: String::new(),
            addresses: Vec::new(),
            login,
            login_server: "https://headscale.example.com/".into(),
            home_relay: String::new(),
            health: Vec::new(),
            routes: RouteStatus::default(),
            peers: Vec::new(),
            rx_bytes: 0,
            tx_bytes: 0,
        }
    }

    fn container(name: &str, engine: Engine, node: Status) -> ContainerStatus {
        ContainerStatus {
            container: name.into(),
            container_id: "ae48c7267541".into(),
            engine,
            network: "tailnet".into(),
            interface: "tailscale0".into(),
            node,
        }
    }

    fn peer(
        name: &str,
        address: &str,
        online: Option<bool>,
        path: PeerPath,
        bytes: u64,
    ) -> PeerStatus {
        PeerStatus {
            name: name.into(),
            addresses: vec![address.parse().unwrap()],
            online,
            routes: Vec::new(),
            path,
            rx_bytes: bytes,
            tx_bytes: bytes / 1024,
        }
    }

    #[test]
    fn two_containers_and_their_peers() {
        let web = Status {
            name: "web.demo.internal".into(),
            addresses: vec![
                "100.64.0.1".parse().unwrap(),
                "fd7a:115c:a1e0::1".parse().unwrap(),
            ],
            peers: vec![
                peer(
                    "db.demo.internal",
                    "100.64.0.2",
                    Some(true),
                    PeerPath::Direct {
                        address: "10.0.0.2:41641".parse().unwrap(),
                    },
                    5 << 20,
                ),
                peer(
                    "far.demo.internal",
                    "100.64.0.3",
                    None,
                    PeerPath::Relay {
                        region: "fra".into(),
                    },
                    2000,
                ),
                peer(
                    "old.demo.internal",
                    "100.64.0.4",
                    Some(false),
                    PeerPath::Idle,
                    0,
                ),
                peer(
                    "q.demo.internal",
                    "100.64.0.5",
                    Some(true),
                    PeerPath::Idle,
                    0,
                ),
            ],
            ..node(Login::Running)
        };
        let list = [
            container("new", Engine::Docker, node(Login::Starting)),
            container("web", Engine::Podman, web),
        ];
        assert_eq!(
            render(&list),
            r#"CONTAINER  ENGINE  NETWORK  HOSTNAME           ADDRESSES                     STATE
new        docker  tailnet  web                -                             starting
web        podman  tailnet  web.demo.internal  100.64.0.1,fd7a:115c:a1e0::1  running
  db.demo.internal   100.64.0.2  direct 10.0.0.2:41641  rx 5.0 MiB  tx 5.0 KiB
  far.demo.internal  100.64.0.3  relay "fra"            rx 2.0 KiB  tx 1 B
  old.demo.internal  100.64.0.4  offline                rx 0 B      tx 0 B
  q.demo.internal    100.64.0.5  idle                   rx 0 B      tx 0 B
"#
        );
    }

    #[test]
    fn trouble_comes_with_what_to_do() {
        let words = |login| render(&[container("web", Engine::Podman, node(login))]);
        for (login, expected) in [
            (
                Login::NeedsLogin {
                    url: "https://h/register/x".into(),
                    reason: String::new(),
                },
                "  ! log in: open https://h/register/x\n",
            ),
            (
                Login::NeedsLogin {
                    url: "https://h/register/x".into(),
                    reason: "its key has expired".into(),
                },
                "  ! its key has expired; to let it in again, open https://h/register/x\n",
            ),
            (Login::NeedsApproval, "must approve this node"),
            (
                Login::Refused {
                    error: "invalid key".into(),
                },
                "refused this node: invalid key",
            ),
            (
                Login::Offline {
                    error: "timed out".into(),
                },
                "does not answer (timed out)",
            ),
            (Login::Expired, "restart the container"),
        ] {
            let text = words(login);
            assert!(text.contains(expected), "{text}");
        }
        assert_eq!(words(Login::Running).lines().count(), 2);
    }

    #[test]
    fn routes_are_shown_where_there_are_any() {
        let nets = |nets: &[&str]| nets.iter().map(|net| net.parse().unwrap()).collect();
        let mut gateway = peer("gw.t", "100.64.0.2", Some(true), PeerPath::Idle, 0);
        gateway.routes = nets(&["10.1.0.0/24", "0.0.0.0/0"]);
        let status = Status {
            routes: RouteStatus {
                routed: nets(&["10.2.0.0/24", "fd00:2::/64"]),
                unconfirmed: nets(&["10.3.0.0/24"]),
                exit_node: "gw".into(),
                exits: true,
            },
            peers: vec![gateway],
            ..node(Login::Running)
        };
        let text = render(&[container("web", Engine::Podman, status)]);
        let lines: Vec<_> = text.lines().skip(2).collect();
        assert_eq!(
            lines,
            [
                "  routes 10.2.0.0/24,fd00:2::/64",
                "  offers to route 10.3.0.0/24 (not confirmed: not approved, or another node has the turn)",
                "  everything leaves by gw",
                "  gw.t  100.64.0.2  idle  rx 0 B  tx 0 B  routes 10.1.0.0/24,0.0.0.0/0",
            ]
        );
    }

    #[test]
    fn nothing_is_said_in_a_sentence() {
        assert!(render(&[]).starts_with("No container is on a tailnet."));
    }

    #[test]
    fn a_server_cannot_write_to_the_terminal() {
        let evil = Status {
            name: "a\u{1b}[2Jb".into(),
            health: vec!["x\ny".into()],
            ..node(Login::Running)
        };
        let text = render(&[container("web", Engine::Podman, evil)]);
        assert!(
            !text.contains('\u{1b}') && text.lines().count() == 3,
            "{text:?}"
        );
    }

    #[test]
    fn sizes_have_three_digits_at_most() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (10 * 1024, "10 KiB"),
            (1_048_575, "1.0 MiB"),
            (5 << 30, "5.0 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
