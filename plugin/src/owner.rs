//! Whose daemon it is, and where its files are: the host's, or that of a user whose Podman runs
//! without root.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
};

use rustix::process::geteuid;

/// The host's daemon has its socket here.
const HOST_RUN: &str = "/run/tailnode";

/// Whose containers a daemon serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Root's, which are the host's.
    Host,
    /// Those of one user.
    User {
        /// The user's directory for what lives as long as a login does: $XDG_RUNTIME_DIR.
        runtime: PathBuf,
        /// $XDG_STATE_HOME
        state: PathBuf,
        /// $XDG_CONFIG_HOME
        config: PathBuf,
        /// $XDG_DATA_HOME
        data: PathBuf,
    },
}

impl Owner {
    /// The one that this process belongs to.
    pub fn here() -> Owner {
        Owner::of(geteuid().as_raw(), |name| env::var_os(name))
    }

    /// The one that a process belongs to, by its user and its environment.
    fn of(uid: u32, variable: impl Fn(&str) -> Option<OsString>) -> Owner {
        // Podman makes its user root of a namespace, in which it runs its plugins, and says here who
        // that is outside (containers-storage: pkg/unshare). The map of the namespace would not tell:
        // root of a container that is a host to others has one too.
        let outside = variable("_CONTAINERS_ROOTLESS_UID")
            .and_then(|uid| uid.to_str()?.parse().ok())
            .filter(|_| uid == 0);
        let uid: u32 = outside.unwrap_or(uid);
        if uid == 0 {
            return Owner::Host;
        }
        let directory = |name| {
            variable(name)
                .map(PathBuf::from)
                .filter(|it| it.is_absolute())
        };
        let home = directory("HOME").unwrap_or_else(|| "/".into());
        let of_home = |name, below| directory(name).unwrap_or_else(|| home.join(below));
        Owner::User {
            runtime: directory("XDG_RUNTIME_DIR")
                .unwrap_or_else(|| format!("/run/user/{uid}").into()),
            state: of_home("XDG_STATE_HOME", ".local/state"),
            config: of_home("XDG_CONFIG_HOME", ".config"),
            data: of_home("XDG_DATA_HOME", ".local/share"),
        }
    }

    /// Where the daemon's socket is.
    pub fn run_dir(&self) -> PathBuf {
        match self {
            Owner::Host => HOST_RUN.into(),
            Owner::User { runtime, .. } => runtime.join("tailnode"),
        }
    }

    /// Where the nodes' keys are kept.
    pub(crate) fn state(&self) -> PathBuf {
        match self {
            Owner::Host => "/var/lib/tailnode".into(),
            Owner::User { state, .. } => state.join("tailnode"),
        }
    }

    /// The file of the options that hold for all its containers.
    pub(crate) fn config(&self) -> PathBuf {
        let directory = match self {
            Owner::Host => Path::new("/etc"),
            Owner::User { config, .. } => config,
        };
        directory.join("tailnode/config.toml")
    }

    /// Podman's state.
    pub(crate) fn podman_db(&self) -> PathBuf {
        let directory = match self {
            Owner::Host => Path::new("/var/lib"),
            Owner::User { data, .. } => data,
        };
        directory.join("containers/storage/db.sql")
    }

    /// Where Docker looks for plugins' sockets. That of a user has networks of its own making.
    pub(crate) fn docker_plugin_dir(&self) -> Option<&'static str> {
        match self {
            Owner::Host => Some("/run/docker/plugins"),
            Owner::User { .. } => None,
        }
    }

    /// What `systemctl` and `journalctl` are told to mean this daemon, and a blank.
    pub(crate) fn flag(&self) -> &'static str {
        match self {
            Owner::Host => "",
            Owner::User { .. } => "--user ",
        }
    }

    /// Whether a container that needs the daemon starts it: that of a user for whom no systemd runs.
    pub(crate) fn starts_on_demand(&self) -> bool {
        match self {
            Owner::Host => false,
            Owner::User { runtime, .. } => !runtime.join("systemd/private").exists(),
        }
    }

    /// What to do when the daemon is not there.
    pub(crate) fn how_to_start(&self) -> String {
        match self {
            Owner::Host => "start it with `systemctl start tailnoded`".into(),
            Owner::User { .. } => {
                let start = match self.starts_on_demand() {
                    true => "it starts with the first container of a tailnet, or by `tailnoded &`",
                    false => "start it with `systemctl --user enable --now tailnoded.socket`",
                };
                let other = match Path::new(HOST_RUN).exists() {
                    true => "; the host's own serves root's containers: `sudo tailnode`",
                    false => "",
                };
                format!("{start}{other}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(uid: u32, variables: &[(&str, &str)]) -> Owner {
        Owner::of(uid, |name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| value.into())
        })
    }

    #[test]
    fn root_is_the_host_and_podmans_root_is_not() {
        let ann = [("HOME", "/home/ann"), ("XDG_RUNTIME_DIR", "/run/user/1000")];
        assert_eq!(owner(0, &ann), Owner::Host);
        assert_eq!(owner(0, &[("_CONTAINERS_ROOTLESS_UID", "")]), Owner::Host);
        // Podman run by root says so, too.
        assert_eq!(owner(0, &[("_CONTAINERS_ROOTLESS_UID", "0")]), Owner::Host);
        let user = owner(1000, &ann);
        assert!(matches!(user, Owner::User { .. }));
        let inside = [&ann[..], &[("_CONTAINERS_ROOTLESS_UID", "1000")]].concat();
        assert_eq!(owner(0, &inside), user);
        // Of a program that somebody else left it to.
        let stray = [&ann[..], &[("_CONTAINERS_ROOTLESS_UID", "0")]].concat();
        assert_eq!(owner(1000, &stray), user);
    }

    #[test]
    fn everything_of_a_user_is_the_users() {
        let ann = owner(1000, &[("HOME", "/home/ann")]);
        assert_eq!(ann.run_dir(), Path::new("/run/user/1000/tailnode"));
        assert_eq!(ann.state(), Path::new("/home/ann/.local/state/tailnode"));
        assert_eq!(
            ann.config(),
            Path::new("/home/ann/.config/tailnode/config.toml")
        );
        let database = "/home/ann/.local/share/containers/storage/db.sql";
        assert_eq!(ann.podman_db(), Path::new(database));
        assert_eq!(ann.docker_plugin_dir(), None);
        let bob = owner(
            1001,
            &[
                ("HOME", "/home/bob"),
                ("XDG_RUNTIME_DIR", "/tmp/bob"),
                ("XDG_STATE_HOME", "/s"),
                ("XDG_CONFIG_HOME", "relative"), // which the specification says to ignore
                ("XDG_DATA_HOME", "/d"),
            ],
        );
        assert_eq!(bob.run_dir(), Path::new("/tmp/bob/tailnode"));
        assert_eq!(bob.state(), Path::new("/s/tailnode"));
        assert_eq!(
            bob.config(),
            Path::new("/home/bob/.config/tailnode/config.toml")
        );
        assert_eq!(bob.podman_db(), Path::new("/d/containers/storage/db.sql"));
    }

    #[test]
    fn who_must_start_it_is_told_how() {
        let host = Owner::Host.how_to_start();
        assert!(host.contains("`systemctl start tailnoded`"), "{host}");
        let directory = tempfile::tempdir().unwrap();
        let runtime = directory.path().to_str().unwrap();
        let user = || owner(1000, &[("XDG_RUNTIME_DIR", runtime)]).how_to_start();
        assert!(user().contains("first container"), "{}", user());
        std::fs::create_dir(directory.path().join("systemd")).unwrap();
        std::fs::write(directory.path().join("systemd/private"), "").unwrap();
        let user = user();
        assert!(
            user.contains("systemctl --user enable --now tailnoded.socket"),
            "{user}"
        );
    }
}
