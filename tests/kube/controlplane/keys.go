package controlplane

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

const certificateLifetime = 365 * 24 * time.Hour

// authority signs the certificates of one directory.
type authority struct {
	dir         string
	certificate *x509.Certificate
	key         crypto.Signer
}

// writeKeys makes a new authority, the API server's and the administrator's
// certificates, and a kubeconfig for url in dir, and the service account key if
// dir has none. Files are readable by their owner only.
func writeKeys(dir, url string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := keepServiceAccountKey(filepath.Join(dir, "service-account.key")); err != nil {
		return err
	}
	ca, err := newAuthority(dir)
	if err != nil {
		return err
	}
	server := template("kube-apiserver")
	server.DNSNames = []string{"localhost", "kubernetes", "kubernetes.default"}
	server.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), serviceAddress}
	server.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	if err := ca.issue("apiserver", server); err != nil {
		return err
	}
	// system:masters is bound to cluster-admin by the API server's own bootstrap.
	admin := template("admin", "system:masters")
	admin.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if err := ca.issue("admin", admin); err != nil {
		return err
	}
	return writeKubeconfig(dir, url)
}

func newAuthority(dir string) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	ca := &authority{dir: dir, certificate: template("local-kube authority"), key: key}
	ca.certificate.IsCA = true
	ca.certificate.BasicConstraintsValid = true
	ca.certificate.KeyUsage = x509.KeyUsageCertSign
	if err := ca.sign("ca", ca.certificate, key); err != nil {
		return nil, err
	}
	return ca, nil
}

// issue writes name.key and name.crt.
func (ca *authority) issue(name string, certificate *x509.Certificate) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if err := writePrivateKey(filepath.Join(ca.dir, name+".key"), key); err != nil {
		return err
	}
	return ca.sign(name, certificate, key)
}

func (ca *authority) sign(name string, certificate *x509.Certificate, key crypto.Signer) error {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return err
	}
	certificate.SerialNumber = serial
	der, err := x509.CreateCertificate(
		rand.Reader, certificate, ca.certificate, key.Public(), ca.key)
	if err != nil {
		return fmt.Errorf("certificate %s: %w", name, err)
	}
	return writePEM(filepath.Join(ca.dir, name+".crt"), "CERTIFICATE", der)
}

func template(name string, groups ...string) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		Subject:   pkix.Name{CommonName: name, Organization: groups},
		NotBefore: now.Add(-time.Minute), // a client's clock may lag
		NotAfter:  now.Add(certificateLifetime),
		KeyUsage:  x509.KeyUsageDigitalSignature,
	}
}

func keepServiceAccountKey(path string) error {
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	return writePrivateKey(path, key)
}

func writePrivateKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return writePEM(path, "EC PRIVATE KEY", der)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

// writeKubeconfig writes a kubeconfig that carries its certificates, so that it can be copied.
func writeKubeconfig(dir, url string) error {
	config := clientcmdapi.NewConfig()
	cluster, user := clientcmdapi.NewCluster(), clientcmdapi.NewAuthInfo()
	cluster.Server = url
	for file, target := range map[string]*[]byte{
		"ca.crt":    &cluster.CertificateAuthorityData,
		"admin.crt": &user.ClientCertificateData,
		"admin.key": &user.ClientKeyData,
	} {
		content, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			return err
		}
		*target = content
	}
	kube := clientcmdapi.NewContext()
	kube.Cluster, kube.AuthInfo = "local", "admin"
	config.Clusters["local"] = cluster
	config.AuthInfos["admin"] = user
	config.Contexts["local"] = kube
	config.CurrentContext = "local"
	return clientcmd.WriteToFile(*config, filepath.Join(dir, "kubeconfig"))
}
