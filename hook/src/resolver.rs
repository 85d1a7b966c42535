//! The container's resolv.conf, in which the node's resolver comes first.

use std::{env, fs, io, net::IpAddr, path::Path};

/// Where netavark tells aardvark-dns, below the directory of what runs: a file for each network. Its
/// first line has the addresses to listen at, the others begin with the ids of containers.
const NETWORKS: &str = "containers/networks/aardvark-dns";

/// Podman's own, beside ours. It writes that when the hooks are through, in place.
const PODMANS: &str = "resolv.conf";

/// Writes the file for this container: the node's resolver and search domains, then the servers of
/// the bridges that it is on. Where the node's is not to be asked, it is what Podman makes of it.
pub fn write(
    file: &Path,
    container_id: &str,
    servers: &[IpAddr],
    domains: &[String],
) -> Result<(), String> {
    let run = env::var_os("XDG_RUNTIME_DIR").filter(|run| !run.is_empty());
    let networks = Path::new(run.as_deref().unwrap_or("/run".as_ref())).join(NETWORKS);
    let write = || match servers {
        [] => leave_to_podman(file),
        _ => {
            let text = of_bridges(&networks, container_id)?;
            fs::write(file, with(&text, servers, domains))
        }
    };
    write().map_err(|error| format!("cannot write {}: {error}", file.display()))
}

/// What Podman will write is in our file too, which may be in the container already. Where it makes
/// none, as for a container without a network, ours has what the host's has.
fn leave_to_podman(file: &Path) -> io::Result<()> {
    let podmans = file.with_file_name(PODMANS);
    match fs::remove_file(&podmans) {
        Ok(()) => fs::hard_link(file, podmans),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::write(file, fs::read("/etc/resolv.conf")?)
        }
        Err(error) => Err(error),
    }
}

/// The servers that know the containers on its bridges.
fn of_bridges(networks: &Path, container_id: &str) -> io::Result<String> {
    let mut text = String::new();
    let files = match fs::read_dir(networks) {
        Ok(files) => files,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(text),
        Err(error) => return Err(error),
    };
    for file in files {
        let network = fs::read_to_string(file?.path())?;
        let mut lines = network.lines();
        let first = lines.next().and_then(|line| line.split_whitespace().next());
        if !lines.any(|line| line.split_whitespace().next() == Some(container_id)) {
            continue;
        }
        for server in first.into_iter().flat_map(|line| line.split(',')) {
            // The file of aardvark-dns's own pid has none.
            if server.parse::<IpAddr>().is_ok() {
                text += &format!("search dns.podman\nnameserver {server}\n");
            }
        }
    }
    Ok(text)
}

/// The node's resolver comes first: it passes on what it does not know. A name is completed with
/// the domains of the container's other networks before ours, as Podman does it.
fn with(text: &str, servers: &[IpAddr], domains: &[String]) -> String {
    let mut all_servers: Vec<String> = servers.iter().map(IpAddr::to_string).collect();
    let mut all_domains = Vec::new();
    let mut rest = String::new();
    for line in text.lines() {
        let mut words = line.split_whitespace().map(str::to_owned);
        match words.next().as_deref() {
            Some("nameserver") => all_servers.extend(words.next()),
            // Of several such lines the last counts.
            Some("search" | "domain") => all_domains = words.collect(),
            _ => rest += &format!("{line}\n"),
        }
    }
    all_domains.extend(domains.iter().cloned());
    let mut text = String::new();
    if !all_domains.is_empty() {
        text += &format!("search {}\n", once(all_domains).join(" "));
    }
    for server in once(all_servers) {
        text += &format!("nameserver {server}\n");
    }
    text + &rest
}

/// Each in its first place only.
fn once(all: Vec<String>) -> Vec<String> {
    let mut seen = Vec::new();
    for one in all {
        if !seen.contains(&one) {
            seen.push(one);
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_resolver_is_first_and_all_else_stays() {
        let servers = ["100.100.100.100".parse().unwrap()];
        let domains = ["x.ts.net".to_owned()];
        let alone = "search x.ts.net\nnameserver 100.100.100.100\n";
        assert_eq!(with("", &servers, &domains), alone);
        let bridge = "search dns.podman\nnameserver 10.89.0.1\noptions ndots:2\n";
        let both = "search dns.podman x.ts.net\nnameserver 100.100.100.100\nnameserver 10.89.0.1\n\
                    options ndots:2\n";
        assert_eq!(with(bridge, &servers, &domains), both);
        // A container that is started again.
        assert_eq!(with(both, &servers, &domains), both);
        assert_eq!(with("", &servers, &[]), "nameserver 100.100.100.100\n");
    }

    #[test]
    fn what_podman_writes_later_is_in_our_file() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name| directory.path().join(name);
        let ours = at("resolv.conf.tailnode");
        fs::write(&ours, "").unwrap();
        fs::write(at("resolv.conf"), "").unwrap();
        write(&ours, "c1", &[], &[]).unwrap();
        fs::write(at("resolv.conf"), "nameserver 169.254.1.1\n").unwrap();
        assert_eq!(fs::read(&ours).unwrap(), b"nameserver 169.254.1.1\n");
    }

    #[test]
    fn bridges_are_found_where_netavark_writes_them() {
        let directory = tempfile::tempdir().unwrap();
        let (here, gone) = (directory.path(), directory.path().join("gone"));
        assert_eq!(of_bridges(&gone, "c1").unwrap(), "");
        // As netavark 1.14 writes them.
        fs::write(
            here.join("lan"),
            "10.89.0.1,fd00::1\nc1 10.89.0.2  web,c1\nc2 10.89.0.3  db\n",
        )
        .unwrap();
        fs::write(here.join("other"), "10.90.0.1\nc2 10.90.0.2  db\n").unwrap();
        fs::write(here.join("aardvark.pid"), "272").unwrap();
        let search = "search dns.podman\n";
        let lan = format!("{search}nameserver 10.89.0.1\n{search}nameserver fd00::1\n");
        assert_eq!(of_bridges(here, "c1").unwrap(), lan);
        assert_eq!(of_bridges(here, "c3").unwrap(), "");
    }
}
