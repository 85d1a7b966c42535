//! Which identities, kept in one directory each, are in use.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::{sync::watch, time::Instant};

use crate::{Error, options};

/// The identities of a host's nodes. A network and a hostname make one, and keep its keys and so
/// its address from one container to the next.
pub(crate) struct Identities {
    directory: PathBuf,
    held: Arc<watch::Sender<HashMap<PathBuf, Held>>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    Running,
    Ending,
}

/// An identity in use: nobody else gets it until this is dropped.
pub(crate) struct Identity {
    /// The name to ask for.
    pub(crate) hostname: String,
    /// Where its keys are.
    pub(crate) directory: PathBuf,
    /// Whether it has none yet.
    pub(crate) fresh: bool,
    held: Arc<watch::Sender<HashMap<PathBuf, Held>>>,
}

impl Identities {
    /// Those with their keys below `directory`.
    pub(crate) fn new(directory: PathBuf) -> Self {
        Identities {
            directory,
            held: Arc::new(watch::Sender::new(HashMap::new())),
        }
    }

    /// Takes the identity of `hostname` on `network`, or where a running container has it, that of
    /// `hostname-1` and so on. One whose node is just stopping is waited for.
    pub(crate) async fn take(
        &self,
        network: &str,
        hostname: &str,
        deadline: Instant,
    ) -> Result<Identity, Error> {
        let network = self.directory.join(file_name(network));
        let mut changes = self.held.subscribe();
        loop {
            changes.mark_unchanged();
            if let Some(identity) = self.take_now(&network, hostname) {
                return Ok(identity);
            }
            match tokio::time::timeout_at(deadline, changes.changed()).await {
                Ok(Ok(())) => {}
                _ => {
                    return Err(Error::StillStopping {
                        hostname: hostname.to_owned(),
                    });
                }
            }
        }
    }

    fn take_now(&self, network: &Path, hostname: &str) -> Option<Identity> {
        let mut taken = None;
        self.held.send_if_modified(|held| {
            let numbered = (1..).map(|number| options::numbered_label(hostname, number));
            for candidate in std::iter::once(hostname.to_owned()).chain(numbered) {
                let directory = network.join(&candidate);
                match held.get(&directory) {
                    Some(Held::Running) => continue,
                    Some(Held::Ending) => return false,
                    None => {
                        held.insert(directory.clone(), Held::Running);
                        taken = Some((candidate, directory));
                        return true;
                    }
                }
            }
            false
        });
        let (hostname, directory) = taken?;
        let fresh = !directory.exists();
        Some(Identity {
            hostname,
            directory,
            fresh,
            held: self.held.clone(),
        })
    }
}

impl Identity {
    /// Says that the node is being stopped: who wants the identity next waits for that.
    pub(crate) fn ending(&self) {
        self.held.send_modify(|held| {
            held.insert(self.directory.clone(), Held::Ending);
        });
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        self.held.send_modify(|held| {
            held.remove(&self.directory);
        });
    }
}

/// A file name that no other network's name gives: what is not a letter, digit, hyphen,
/// underscore or inner dot becomes %XX.
pub(crate) fn file_name(name: &str) -> String {
    let mut file_name = String::new();
    for (position, byte) in name.bytes().enumerate() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => file_name.push(byte.into()),
            b'.' if position > 0 => file_name.push('.'),
            _ => file_name.push_str(&format!("%{byte:02X}")),
        }
    }
    if file_name.is_empty() {
        "%".into()
    } else {
        file_name
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use proptest::prelude::*;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[tokio::test]
    async fn one_name_is_one_identity_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let identities = Identities::new(directory.path().to_owned());
        let first = identities.take("tailnet", "web", soon()).await.unwrap();
        let second = identities.take("tailnet", "web", soon()).await.unwrap();
        let elsewhere = identities.take("other", "web", soon()).await.unwrap();
        assert_eq!(
            (&*first.hostname, &*second.hostname, &*elsewhere.hostname),
            ("web", "web-1", "web")
        );
        assert!(first.fresh && first.directory.ends_with("tailnet/web"));
        fs::create_dir_all(&first.directory).unwrap();
        drop(first);
        let again = identities.take("tailnet", "web", soon()).await.unwrap();
        assert_eq!(again.hostname, "web");
        assert!(!again.fresh);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_ending_is_waited_for() {
        let identities = Identities::new("/nonexistent".into());
        let first = identities.take("tailnet", "web", soon()).await.unwrap();
        first.ending();
        let error = identities
            .take("tailnet", "web", soon())
            .await
            .err()
            .unwrap();
        assert!(matches!(error, Error::StillStopping { .. }), "{error}");
        let deadline = soon();
        let (next, ()) = tokio::join!(identities.take("tailnet", "web", deadline), async move {
            tokio::task::yield_now().await;
            drop(first);
        });
        assert_eq!(next.unwrap().hostname, "web");
    }

    proptest! {
        #[test]
        fn two_networks_never_share_a_directory(one: String, other: String) {
            prop_assert_eq!(one == other, file_name(&one) == file_name(&other));
            prop_assert!(!file_name(&one).contains('/'));
            prop_assert!(!file_name(&one).starts_with('.'));
        }
    }
}
