//! The container's resolv.conf, when the node's resolver is to be asked first.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    net::IpAddr,
    path::Path,
};

/// Puts the node's resolver and search domains into the file. It stays the same file: the container
/// has it mounted. Without a resolver it is left alone.
pub fn write(file: &Path, servers: &[IpAddr], domains: &[String]) -> Result<(), String> {
    if servers.is_empty() {
        return Ok(());
    }
    let write = || {
        let text = with(&fs::read_to_string(file)?, servers, domains);
        let mut file = OpenOptions::new().write(true).truncate(true).open(file)?;
        file.write_all(text.as_bytes())
    };
    write().map_err(|error| format!("cannot write {}: {error}", file.display()))
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
    fn the_file_stays_the_same() {
        use std::os::unix::fs::MetadataExt;
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("resolv.conf");
        let refused = write(&file, &["100.100.100.100".parse().unwrap()], &[]);
        assert!(refused.unwrap_err().contains("resolv.conf"));
        fs::write(
            &file,
            "nameserver 192.0.2.1\n# a long line that is to be there no more\n",
        )
        .unwrap();
        let inode = fs::metadata(&file).unwrap().ino();
        write(&file, &[], &[]).unwrap();
        write(&file, &["100.100.100.100".parse().unwrap()], &[]).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().ino(), inode);
        let text = fs::read_to_string(&file).unwrap();
        assert!(
            text.starts_with("nameserver 100.100.100.100\nnameserver 192.0.2.1\n"),
            "{text}"
        );
    }
}
